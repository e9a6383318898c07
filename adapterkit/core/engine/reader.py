"""Read inputs of tasks and edits: whole tensors, rows, shared stacks of experts' factors,
handoffs."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

from adapterkit.core import dtypes
from adapterkit.core.budget import STACKS
from adapterkit.core.checkpoint.folder import place_of
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.checkpoint.reader import Sources
from adapterkit.core.engine.buffers import staging_of
from adapterkit.core.engine.device import used_here
from adapterkit.core.errors import Unrecoverable, shown
from adapterkit.core.lazy import Tensor, torch
from adapterkit.core.plan import HANDOFF_FOLDER
from adapterkit.core.tasks.handoff import HandoffReader
from adapterkit.core.tasks.rows import chunks
from adapterkit.core.weights.codec import QuantizedWeight, decode_checked, read_parts
from adapterkit.kernels.sums import all_finite

LEAST_STACKS = 3  # stacks of experts' factors that are kept however large they are


@dataclass
class LocalReader:
    """The `Reader` of a job on this machine, for its open files and the handoffs of earlier
    files."""

    sources: Sources
    device: torch.device
    dtype: torch.dtype | None = field(default_factory=lambda: torch.float32)
    handoffs: HandoffReader | None = None
    finite: bool = True  # whether tensors that are not finite are refused
    stacks: SharedStacks = field(default_factory=lambda: SharedStacks())
    decoded: Callable[[], Iterator[tuple[int, Tensor]]] | None = None  # yields the `blocks`

    def view(
        self,
        dtype: torch.dtype | None,
        blocks: Callable[[], Iterator[tuple[int, Tensor]]] | None = None,
    ) -> LocalReader:
        return replace(self, dtype=dtype, decoded=blocks or self.decoded)

    def handoff(self, key: str) -> Tensor:
        assert self.handoffs is not None
        return self.handoffs.tensor(key).to(self.device)

    def tensor(self, spec: TensorSpec) -> Tensor:
        if not isinstance(spec, QuantizedWeight):
            return self._stored(spec, self.dtype)
        parts, hint = read_parts(spec, self._stored), "download the checkpoint again"
        value = decode_checked(spec, parts, hint) if self.finite else spec.decode(parts)
        return value if self.dtype is None else value.to(self.dtype)

    def _stored(self, spec: TensorSpec, dtype: torch.dtype | None = None) -> Tensor:
        """Return a tensor in a dtype, or as it is stored."""
        if spec.folder == HANDOFF_FOLDER:
            assert self.handoffs is not None
            data = self.handoffs.read(spec.key, spec.start, spec.stop)
            value = dtypes.tensor_of(data, spec.dtype, spec.shape).to(self.device)
            return value if dtype is None else value.to(dtype)
        is_checked = self.finite and spec.dtype in dtypes.FLOATS
        return staging_of(self.device).load(
            partial(self.sources.read_into, spec),
            dtypes.torch_dtype(spec.dtype),
            spec.shape,
            dtype,
            look=partial(self._check_finite, spec) if is_checked else None,
        )

    def _check_finite(self, spec: TensorSpec, values: Tensor) -> None:
        if not all_finite(values):
            file = place_of(self.sources.folders[spec.folder], spec.file)
            raise Unrecoverable(
                "values are not finite (NaN or infinity)",
                expected="finite values",
                where=f"{file}: {shown(spec.key)}",
                hint="the training run diverged: use an earlier save",
                code="AK208",
            )

    def bytes(self, spec: TensorSpec) -> bytearray:
        return self.sources.read(spec)

    def shared(self, spec: TensorSpec, cut: Callable[[Tensor], Tensor]) -> Tensor:
        return used_here(self.stacks.get(spec, lambda: cut(self._stored(spec))))

    def rows(
        self,
        spec: TensorSpec,
        grid: tuple[int, int],
        first: int,
        last: int,
        into: Tensor | None = None,
    ) -> Tensor:
        """Return rows; `into` is memory to reuse for them, on the CPU."""
        width = dtypes.BITS[spec.dtype] // 8 * grid[1]
        return staging_of(self.device).load(
            lambda at, memory: self.sources.read_into(spec, first * width + at, memory),
            dtypes.torch_dtype(spec.dtype),
            (last - first, grid[1]),
            self.dtype,
            into=into,
        )

    def blocks(self, spec: TensorSpec, grid: tuple[int, int]) -> Iterator[tuple[int, Tensor]]:
        if self.decoded is not None:
            yield from self.decoded()
            return
        for first, last in chunks(grid, self.device):
            yield first, self.rows(spec, grid, first, last)


class SharedStacks:
    """The slices last cut from stacks of experts' factors; thread-safe.

    Consecutive steps request a few in turn: those of gate and up, and of down, for each adapter."""

    def __init__(self):
        self.lock, self.stacks = threading.Lock(), OrderedDict[TensorSpec, _Stack]()

    def get(self, spec: TensorSpec, make: Callable[[], Tensor]) -> Tensor:
        with self.lock:
            stack = self.stacks.setdefault(spec, _Stack())
            self.stacks.move_to_end(spec)
        with stack.lock:  # others may read other stacks meanwhile
            if stack.value is None:
                stack.value = make()
                if stack.value.is_cuda:
                    # other workers have other streams
                    torch.cuda.current_stream(stack.value.device).synchronize()
        with self.lock:
            while (
                len(self.stacks) > LEAST_STACKS
                and sum(spec.nbytes for spec in self.stacks) > STACKS
            ):
                self.stacks.popitem(last=False)
        return stack.value


@dataclass
class _Stack:
    value: Tensor | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

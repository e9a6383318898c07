"""Interfaces by which computations read their inputs, for every engine."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Protocol

from adapterkit.core.checkpoint.header import TensorSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    Cut = Callable[[Tensor], Tensor]
    Blocks = Iterator[tuple[int, Tensor]]


class TensorReader(Protocol):
    """A reader of whole tensors, in one dtype or as stored. It suffices to assemble parameters,
    factors and expressions."""

    def tensor(self, spec: TensorSpec) -> "Tensor":
        """The whole tensor, decoded if it is quantized, on `device`; the caller may change it.

        `Unrecoverable` if it is not finite, except for reports."""
        ...


class Reader(TensorReader, Protocol):
    """The inputs of steps and tasks: the same tensors for every engine, order and thread.

    `Failed` if a file cannot be read, `Unrecoverable` if it has changed since it was planned.
    """

    @property
    def device(self) -> "torch.device": ...

    @property
    def dtype(self) -> "torch.dtype | None":
        """The dtype of the arithmetic: float32 or float64. None: each tensor's own, and float32 for
        quantized weights."""
        ...

    def view(
        self, dtype: "torch.dtype | None", blocks: "Callable[[], Blocks] | None" = None
    ) -> "Reader":
        """The same inputs in another dtype; `blocks`: of the tensor that edits read by blocks, if
        it is decoded elsewhere."""
        ...

    def bytes(self, spec: TensorSpec) -> bytearray:
        """The stored bytes; not for a quantized weight."""
        ...

    def rows(self, spec: TensorSpec, grid: tuple[int, int], first: int, last: int) -> "Tensor":
        """Rows [first, last) of a tensor as a grid (rows, columns), in `dtype`, on `device`, finite
        or not; not for a quantized weight."""
        ...

    def blocks(self, spec: TensorSpec, grid: tuple[int, int]) -> "Blocks":
        """Yield (first row, rows) over the whole grid in order, as `rows` returns them, some at a
        time."""
        ...

    def shared(self, spec: TensorSpec, cut: "Cut") -> "Tensor":
        """cut(the stored tensor), computed once for callers that need it at about the same time; do
        not change it.

        `cut` must be the same function of the tensor for all calls with one `spec`."""
        ...

    def handoff(self, key: str) -> "Tensor":
        """A tensor that a task of an earlier output file handed on, in its own dtype, on
        `device`."""
        ...

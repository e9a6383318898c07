"""Hand tensors from one output file to a later one, such as factors made with a quantized weight.

A task returns them in `TaskResult.handoff`. `HandoffWriter` stores them in a file next to the
finished one, and the journal records their positions. Tasks of later files, such as
`HandoffFactors`, read them through `Reader.handoff`; steps of streamed files, which are written
last, read them as tensors of the folder `HANDOFF_FOLDER`. After all files are finished they are
removed."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

from adapterkit.core import dtypes
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.errors import Unrecoverable, shown
from adapterkit.core.lazy import Tensor
from adapterkit.core.output.journal import read_result
from adapterkit.core.output.stage import HANDOFF, Workspace
from adapterkit.core.output.writer import ShardFile
from adapterkit.core.plan import HANDOFF_FOLDER, OutputFile, TaskResult
from adapterkit.core.tasks.common import RankedFactors
from adapterkit.core.weights.reader import Reader

# (position, bytes) of a tensor's pieces, in host memory
Blocks = Callable[[Tensor], Iterable[tuple[int, memoryview]]]


def handoff_keys(name: str) -> tuple[str, str]:
    """The keys of a task's factors a and b in the handoff."""
    return f"{name}.a", f"{name}.b"


def handoff_of(name: str, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    """The handoff of a task's factors, as `HandoffFactors` reads it."""
    return dict(zip(handoff_keys(name), (a, b), strict=True))


def handed_on(
    name: str, dtype: str, shapes: tuple[tuple[int, ...], tuple[int, ...]]
) -> tuple[TensorSpec, TensorSpec]:
    """a and b of `handoff_of`, as inputs of steps."""
    a, b = (
        TensorSpec(key, dtype, shape, "", 0, dtypes.size(dtype, math.prod(shape)), HANDOFF_FOLDER)
        for key, shape in zip(handoff_keys(name), shapes, strict=True)
    )
    return a, b


@dataclass(frozen=True)
class HandoffFactors(RankedFactors):
    """One module's factors, computed with a weight or a module of an earlier file."""

    source: str | None = None  # the task that computed them; None: one of the same name

    @property
    def handoff_reads(self) -> tuple[str, ...]:
        return handoff_keys(self.source or self.name)

    @property
    def memory(self) -> int:
        return 3 * sum(stored.nbytes for stored in self.max_outputs)

    def compute(self, inputs: Reader) -> TaskResult:
        a, b = map(inputs.handoff, self.handoff_reads)
        return TaskResult(self.round_matrices(a, b, self.rank), self.planned_metrics)


class HandoffWriter:
    """A writer of one output file's handoff; it creates no file if there is none."""

    def __init__(self, stage: Workspace, file: OutputFile):
        self.stage, self.name = stage, file.file + HANDOFF
        self.file: ShardFile | None = None
        self.position = 0
        self.places: dict[str, list] = {}  # key -> [dtype, shape, position], for the journal

    def put(self, tensors: dict[str, Tensor], blocks: Blocks) -> None:
        for key, tensor in tensors.items():
            if self.file is None:
                self.file = ShardFile(self.stage.path, self.name, 0, self.stage.attempt)
            for first, block in blocks(tensor):
                self.file.write(block, self.position + first)
            self.places[key] = [dtypes.name_of(tensor.dtype), list(tensor.shape), self.position]
            self.position += tensor.nbytes

    def close(self) -> None:
        if self.file is not None:
            self.file.sync()
            self.file.publish()


class HandoffReader:
    """A reader of the handoffs of all finished files, by the journal's positions."""

    def __init__(self, stage: Workspace):
        self.stage = stage

    @cached_property
    def places(self) -> dict[str, tuple[str, list]]:
        results = [read_result(entry) for entry in self.stage.journal()]
        return {
            key: (result.file, place)
            for result in results
            if result is not None
            for key, place in result.handoffs.items()
        }

    def _place(self, key: str) -> tuple[str, list]:
        if key not in self.places:
            raise Unrecoverable(
                f"no handoff has {shown(key)}",
                expected="its file, as it was written",
                where="the journal",
                hint="run the same command again",
                code="AK209",
            )
        return self.places[key]

    def tensor(self, key: str) -> Tensor:
        _, (dtype, shape, _) = self._place(key)
        data = self.read(key, 0, dtypes.size(dtype, math.prod(shape)))
        return dtypes.tensor_of(data, dtype, shape)

    def read(self, key: str, start: int, stop: int) -> bytearray:
        """Bytes [start, stop) of a tensor."""
        name, (_, _, position) = self._place(key)
        with (self.stage.path / (name + HANDOFF)).open("rb") as file:
            file.seek(position + start)
            data = bytearray(file.read(stop - start))
        if len(data) != stop - start:
            raise Unrecoverable(
                f"the handoff of {shown(key)} is cut short",
                expected="the file as it was written",
                where=name + HANDOFF,
                hint="run the same command again",
                code="AK209",
            )
        return data

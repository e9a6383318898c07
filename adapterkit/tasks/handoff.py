"""The handoff: tensors that one output file computes for a later one, such as factors made with a
quantized weight.

A task returns them in `TaskResult.handoff`; `HandoffWriter` stores them in a file beside the
finished one, the journal records where, and a task of a later file, such as `HandoffFactors`, reads
them through `Reader.handoff`. Once all files are done they are removed.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from adapterkit import dtypes
from adapterkit.checkpoint.header import TensorSpec
from adapterkit.checkpoint.stage import Stage
from adapterkit.checkpoint.writer import ShardFile
from adapterkit.errors import Unrecoverable, shown
from adapterkit.plan import HANDOFF, Computed, TaskResult
from adapterkit.tasks.common import FactorsTask
from adapterkit.tasks.rows import byte_view
from adapterkit.weights.reader import Reader


def handoff_of(module: str, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    """The handoff of a module's factors, as `HandoffFactors` reads it."""
    return {f"{module}.a": a, f"{module}.b": b}


@dataclass(frozen=True)
class HandoffFactors(FactorsTask):
    """One module's factors, computed with the weight of an earlier file."""

    rank: int

    @property
    def reads(self) -> tuple[TensorSpec, ...]:
        return ()

    @property
    def max_rank(self) -> int:
        return self.rank

    @property
    def memory(self) -> int:
        return 3 * sum(stored.nbytes for stored in self.max_outputs)

    def compute(self, inputs: Reader) -> TaskResult:
        a, b = (inputs.handoff(f"{self.name}.{side}") for side in "ab")
        return TaskResult(self.round_matrices(a, b, self.rank), {"rank": self.rank})


class HandoffWriter:
    """Writes the handoff of one output file; without one there is no file."""

    def __init__(self, stage: Stage, file: Computed):
        self.stage, self.name = stage, file.file + HANDOFF
        self.file: ShardFile | None = None
        self.position = 0
        self.places: dict[str, list] = {}  # key -> [dtype, shape, position], for the journal

    def put(self, tensors: dict[str, Tensor]) -> None:
        for key, tensor in tensors.items():
            self.file = self.file or ShardFile(self.stage.path, self.name, 0)
            data = byte_view(tensor)
            self.file.write(data, self.position)
            self.places[key] = [dtypes.name_of(tensor.dtype), list(tensor.shape), self.position]
            self.position += len(data)

    def close(self) -> None:
        if self.file is not None:
            self.file.sync()
            self.file.publish()


class HandoffReader:
    """Reads the handoffs of all finished files, from where the journal has them."""

    def __init__(self, stage: Stage):
        self.stage = stage

    @cached_property
    def places(self) -> dict[str, tuple[str, list]]:
        entries = [entry["shard"] for entry in self.stage.journal() if "shard" in entry]
        return {
            key: (entry["file"], place)
            for entry in entries
            for key, place in entry["handoffs"].items()
        }

    def tensor(self, key: str) -> Tensor:
        name, (dtype, shape, position) = self.places[key]
        size = dtypes.size(dtype, math.prod(shape))
        with (self.stage.path / (name + HANDOFF)).open("rb") as file:
            file.seek(position)
            data = bytearray(file.read(size))
        if len(data) != size:
            raise Unrecoverable(
                f"the handoff of {shown(key)} is cut short",
                expected="the file as it was written",
                where=name + HANDOFF,
                hint="run the same command again",
            )
        torch_dtype = dtypes.torch_dtype(dtype)
        if not data:
            return torch.empty(shape, dtype=torch_dtype)
        return torch.frombuffer(data, dtype=torch_dtype).view(shape)

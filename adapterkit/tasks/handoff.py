"""The handoff: tensors that one output file computes for a later one, such as factors made with a quantized weight.

A task returns them in `TaskResult.handoff`; `HandoffWriter` stores them beside the finished file, the journal records where, and
a task of a later file, such as `HandoffFactors`, reads them through `HandoffReader`. They are removed when all files are done.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from adapterkit import dtypes
from adapterkit.adapters.factors import Place
from adapterkit.checkpoint.layout import Stored
from adapterkit.checkpoint.stage import Stage
from adapterkit.checkpoint.writer import ShardFile
from adapterkit.errors import Unrecoverable, shown
from adapterkit.plan import HANDOFF, Computed, TaskResult
from adapterkit.tasks import common
from adapterkit.tasks.rows import byte_view
from adapterkit.weights.reader import Reader


@dataclass(frozen=True)
class HandoffFactors:
    """One module's factors, made with its quantized weight."""

    name: str
    place: Place
    rank: int
    dtype: str
    reads = ()

    @property
    def max_outputs(self) -> tuple[Stored, ...]:
        return common.bounds(self.place, self.rank, self.dtype)

    @property
    def memory(self) -> int:
        return 3 * sum(stored.nbytes for stored in self.max_outputs)

    def compute(self, inputs: Reader) -> TaskResult:
        a, b = (inputs.handoff(f"{self.name}.{side}") for side in "ab")
        dtype = dtypes.torch_dtype(self.dtype)
        return TaskResult(
            {self.place.a_key: a.to(dtype), self.place.b_key: b.to(dtype)}, {"rank": len(a)}
        )


class HandoffWriter:
    """What the tasks of a file lay aside, in a file beside it."""

    def __init__(self, stage: Stage, file: Computed):
        self.stage, self.name, self.file, self.at = stage, file.file + HANDOFF, None, 0
        self.where: dict[str, list] = {}

    def put(self, tensors: dict[str, Tensor]) -> None:
        for key, tensor in tensors.items():
            self.file = self.file or ShardFile(self.stage.path, self.name, 0)
            data = byte_view(tensor)
            self.file.write(data, self.at)
            self.where[key] = [dtypes.name_of(tensor.dtype), list(tensor.shape), self.at]
            self.at += len(data)

    def close(self) -> None:
        if self.file is not None:
            self.file.sync()
            self.file.publish()


class HandoffReader:
    """What finished files have laid aside, as the journal tells."""

    def __init__(self, stage: Stage):
        self.stage = stage

    @cached_property
    def where(self) -> dict[str, tuple[str, list]]:
        entries = [entry["shard"] for entry in self.stage.journal() if "shard" in entry]
        return {
            key: (entry["file"], place)
            for entry in entries
            for key, place in entry["handoffs"].items()
        }

    def tensor(self, key: str) -> Tensor:
        name, (dtype, shape, at) = self.where[key]
        with (self.stage.path / (name + HANDOFF)).open("rb") as file:
            file.seek(at)
            data = bytearray(file.read(dtypes.size(dtype, math.prod(shape))))
        if len(data) != dtypes.size(dtype, math.prod(shape)):
            found = f"what was laid aside for {shown(key)} is cut short"
            raise Unrecoverable(
                found,
                expected="the file as it was written",
                where=name + HANDOFF,
                hint="run the same command again",
            )
        return (
            torch.frombuffer(data, dtype=dtypes.torch_dtype(dtype)).view(shape)
            if data
            else torch.empty(shape)
        )

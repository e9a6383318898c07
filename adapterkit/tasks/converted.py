"""Tensors of a converted adapter, made from stored ones."""

import math
from dataclasses import dataclass
from typing import cast

import torch

from adapterkit import dtypes
from adapterkit.checkpoint.header import TensorSpec
from adapterkit.checkpoint.layout import Stored
from adapterkit.formats.tensors import Expression
from adapterkit.plan import Task, TaskResult
from adapterkit.weights.reader import Reader


@dataclass(frozen=True)
class ConvertedTensor(Task):
    """An expression under `key`, rounded once to `dtype`; the receipt has what that lost."""

    key: str
    expression: Expression
    dtype: str

    @property
    def reads(self) -> tuple[TensorSpec, ...]:
        return self.expression.reads

    @property
    def max_outputs(self) -> tuple[Stored, ...]:
        return (Stored(self.key, self.dtype, self.expression.shape),)

    @property
    def memory(self) -> int:
        inner = sum(8 * math.prod(spec.shape) for spec in self.reads)
        return inner + 16 * math.prod(self.expression.shape)

    def compute(self, inputs: Reader) -> TaskResult:
        value = self.expression.value(inputs)
        rounded = value.to(dtypes.torch_dtype(self.dtype)).contiguous()
        metrics = {}
        if value.dtype != rounded.dtype:
            wide = value.double()
            lost = torch.linalg.vector_norm(rounded.double() - wide)
            norm = torch.linalg.vector_norm(wide)
            metrics = {"rounding": float(lost / norm) if norm else 0.0}
        return TaskResult({self.key: rounded}, metrics)


@dataclass(frozen=True)
class ConvertedTensors(Task):
    """Expressions that read the same large tensors: each is read once for all of them."""

    outputs: tuple[ConvertedTensor, ...]

    @property
    def reads(self) -> tuple[TensorSpec, ...]:
        return tuple(dict.fromkeys(spec for one in self.outputs for spec in one.reads))

    @property
    def max_outputs(self) -> tuple[Stored, ...]:
        return tuple(stored for one in self.outputs for stored in one.max_outputs)

    @property
    def memory(self) -> int:
        read = sum(8 * math.prod(spec.shape) for spec in self.reads)
        return read + sum(16 * math.prod(one.expression.shape) for one in self.outputs)

    def compute(self, inputs: Reader) -> TaskResult:
        reader = _ReadOnce(inputs)
        tensors: dict[str, torch.Tensor | TensorSpec] = {}
        rounding: list[float] = []
        for one in self.outputs:
            result = one.compute(cast("Reader", reader))
            tensors |= result.tensors
            rounding += result.metrics.values()
        return TaskResult(tensors, {"rounding": max(rounding)} if rounding else {})


class _ReadOnce:
    """Keeps what it has read."""

    def __init__(self, reader: Reader):
        self.reader = reader
        self.tensors: dict[TensorSpec, torch.Tensor] = {}

    def stored(self, spec: TensorSpec) -> torch.Tensor:
        if spec not in self.tensors:
            self.tensors[spec] = self.reader.stored(spec)
        return self.tensors[spec]

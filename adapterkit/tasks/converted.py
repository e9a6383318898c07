"""One tensor of a converted adapter, made from stored ones."""

import math
from dataclasses import dataclass

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

"""One weight without the part that its initial factors take, quantized."""

import math
from dataclasses import dataclass
from typing import Any

from adapterkit import dtypes
from adapterkit.checkpoint.header import TensorSpec
from adapterkit.checkpoint.layout import TensorPlan
from adapterkit.kernels.sums import norm
from adapterkit.plan import Task, TaskResult
from adapterkit.tasks.common import short
from adapterkit.tasks.handoff import handoff_keys
from adapterkit.weights.codec import QuantizedWeight, decode_checked
from adapterkit.weights.reader import Reader


@dataclass(frozen=True)
class ResidualWeight(Task):
    """W - scale·b@a, quantized, or in the dtype of W where it is not to be; a and b were handed
    on by the task of their module."""

    source: TensorSpec
    packed: QuantizedWeight | None
    module: str
    scale: float
    transposed: bool

    @property
    def reads(self) -> tuple[TensorSpec, ...]:
        return (self.source,)

    @property
    def handoff_reads(self) -> tuple[str, ...]:
        return handoff_keys(self.module)

    @property
    def max_outputs(self) -> tuple[TensorPlan, ...]:
        if self.packed is not None:
            return self.packed.max_outputs
        return (TensorPlan(self.source.key, self.source.dtype, self.source.shape),)

    @property
    def variable_size(self) -> tuple[str, ...]:
        return self.packed.variable_size if self.packed else ()

    @property
    def prefers_card(self) -> bool:
        return self.packed is not None

    @property
    def memory(self) -> int:
        return 24 * math.prod(self.source.shape)

    def compute(self, inputs: Reader) -> TaskResult:
        weight = inputs.tensor(self.source)
        a, b = (inputs.handoff(key).float() for key in self.handoff_reads)
        part = (b * self.scale) @ a
        part = part.T if self.transposed else part
        size = norm(weight) or 1.0
        rest, metrics = weight - part, dict[str, Any]()
        if self.packed is None:
            stored = rest.to(dtypes.torch_dtype(self.source.dtype))
            metrics["error"] = short(norm(stored.float() - rest) / size)
            return TaskResult({self.source.key: stored}, metrics)
        plain = decode_checked(self.packed, self.packed.encode(weight))
        metrics["error_plain"] = short(norm(plain.sub_(weight)) / size)
        tensors = self.packed.encode(rest)
        metrics["error"] = short(norm(decode_checked(self.packed, tensors).sub_(rest)) / size)
        return TaskResult(tensors, metrics)

"""One weight without the part that its initial factors take."""

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from adapterkit import dtypes
from adapterkit.checkpoint.header import TensorSpec
from adapterkit.checkpoint.layout import Stored
from adapterkit.kernels import lowrank
from adapterkit.kernels.lowrank import Svd
from adapterkit.kernels.sums import norm
from adapterkit.plan import TaskResult
from adapterkit.tasks.common import short
from adapterkit.weights.codec import QuantizedWeight, decode_checked
from adapterkit.weights.reader import Reader


@dataclass(frozen=True)
class ResidualWeight:
    """One weight without the part that its factors take, in its own dtype or quantized; the factors are laid aside."""

    source: TensorSpec
    packed: QuantizedWeight | None
    module: str
    method: Any
    rank: int
    scale: float
    transposed: bool

    @property
    def name(self) -> str:
        return self.source.key

    @property
    def reads(self) -> tuple[TensorSpec, ...]:
        return (self.source,)

    @property
    def max_outputs(self) -> tuple[Stored, ...]:
        return (
            self.packed.max_outputs
            if self.packed
            else (Stored(self.source.key, self.source.dtype, self.source.shape),)
        )

    @property
    def variable_size(self) -> tuple[str, ...]:
        return self.packed.variable_size if self.packed else ()

    @property
    def memory(self) -> int:
        return 24 * math.prod(self.source.shape)

    def compute(self, inputs: Reader) -> TaskResult:
        weight = inputs.tensor(self.source)
        matrix = weight.T if self.transposed else weight
        a, b = balanced_factors(
            self.method.part(matrix.contiguous(), self.rank), self.rank, self.scale
        )
        taken = (b * self.scale) @ a
        taken = taken.T if self.transposed else taken
        size = norm(weight) or 1.0
        metrics: dict[str, Any] = {"taken": short(norm(taken) / size)}
        handoff = {f"{self.module}.a": a, f"{self.module}.b": b}
        rest = weight - taken
        if self.packed is None:
            stored = rest.to(dtypes.torch_dtype(self.source.dtype))
            metrics["error"] = short(norm(stored.float() - rest) / size)
            return TaskResult({self.source.key: stored}, metrics, handoff)
        plain = decode_checked(self.packed, self.packed.encode(weight))
        metrics["error_plain"] = short(norm(plain.sub_(weight)) / size)
        tensors = self.packed.encode(rest)
        metrics["error"] = short(norm(decode_checked(self.packed, tensors).sub_(rest)) / size)
        return TaskResult(tensors, metrics, handoff)


def balanced_factors(svd: Svd, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """a (rank, in) and b (out, rank) with scale·b@a = u s vᵀ, norms balanced."""
    a, b = lowrank.refit(Svd(svd.u, svd.s / scale, svd.vh), rank)
    return a.contiguous(), b.contiguous()

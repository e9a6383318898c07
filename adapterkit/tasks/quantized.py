"""One weight in a quantized format, with its measured error."""

import math
from dataclasses import dataclass

from torch import Tensor

from adapterkit.checkpoint.header import TensorSpec
from adapterkit.checkpoint.layout import TensorPlan
from adapterkit.kernels.quant.grid import LARGE_PIECE
from adapterkit.kernels.sums import squared_norm
from adapterkit.plan import Task, TaskResult
from adapterkit.tasks.common import short
from adapterkit.weights.codec import QuantizedWeight, decode_checked
from adapterkit.weights.reader import Reader

BLOCK = 1 << 20  # elements compared at a time


@dataclass(frozen=True)
class EncodedWeight(Task):
    """One weight, quantized."""

    source: TensorSpec
    packed: QuantizedWeight

    @property
    def reads(self) -> tuple[TensorSpec, ...]:
        return (self.source,)

    @property
    def max_outputs(self) -> tuple[TensorPlan, ...]:
        return self.packed.max_outputs

    @property
    def variable_size(self) -> tuple[str, ...]:
        return self.packed.variable_size

    @property
    def prefers_card(self) -> bool:
        return True

    @property
    def memory(self) -> int:
        return 6 * self.source.nbytes + 24 * min(math.prod(self.source.shape), LARGE_PIECE)

    def compute(self, inputs: Reader) -> TaskResult:
        weight = inputs.tensor(self.source)
        tensors = self.packed.encode(weight)
        error = relative_error(weight, decode_checked(self.packed, tensors))
        return TaskResult(tensors, {"error": error})


def relative_error(weight: Tensor, other: Tensor) -> float:
    """‖other - W‖_F / ‖W‖_F, to six digits."""
    lost = size = 0.0
    for x, y in zip(weight.reshape(-1).split(BLOCK), other.reshape(-1).split(BLOCK), strict=True):
        lost, size = lost + squared_norm(y - x), size + squared_norm(x)
    return short((lost / size) ** 0.5) if size else 0.0

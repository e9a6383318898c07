"""Factors of one module minus the mean of other adapters' factors (GenKnowSub)."""

from dataclasses import dataclass

from adapterkit import dtypes
from adapterkit.adapters.factors import Factors, Place
from adapterkit.checkpoint.header import TensorSpec
from adapterkit.checkpoint.layout import Stored
from adapterkit.plan import TaskResult
from adapterkit.tasks import common
from adapterkit.weights.reader import Reader


@dataclass(frozen=True)
class SubtractedFactors:
    """PEFT's subtraction of one module: a - mean of the general a's, b - mean of the general b's."""

    name: str
    task_adapter: Factors
    generals: tuple[Factors, ...]
    place: Place
    dtype: str

    @property
    def reads(self) -> tuple[TensorSpec, ...]:
        return tuple(spec for f in (self.task_adapter, *self.generals) for spec in (f.a, f.b))

    @property
    def max_outputs(self) -> tuple[Stored, ...]:
        return common.bounds(self.place, self.task_adapter.rank, self.dtype)

    @property
    def memory(self) -> int:
        return 12 * sum(spec.nbytes for spec in self.reads)

    def compute(self, inputs: Reader) -> TaskResult:
        a, b = self.task_adapter.stored(inputs)
        others = [factors.stored(inputs) for factors in self.generals]
        count = len(others)
        a = a - sum(other for other, _ in others) / count
        b = (b - sum(other for _, other in others) / count) * self.task_adapter.scale
        a_shape, b_shape = self.place.shapes(self.task_adapter.rank)
        dtype = dtypes.torch_dtype(self.dtype)
        tensors = {
            self.place.a_key: a.reshape(a_shape).to(dtype),
            self.place.b_key: b.reshape(b_shape).to(dtype),
        }
        return TaskResult(tensors, {"rank": self.task_adapter.rank})

"""Factors of one module minus the mean of other adapters' factors (GenKnowSub)."""

from dataclasses import dataclass
from typing import Any

from adapterkit.adapters.factors import Factors
from adapterkit.checkpoint.header import TensorSpec
from adapterkit.plan import TaskResult
from adapterkit.tasks.common import FactorsTask
from adapterkit.weights.reader import Reader


@dataclass(frozen=True)
class SubtractedFactors(FactorsTask):
    """PEFT's subtraction: a - mean of the general a's, scale · (b - mean of the general b's)."""

    task_adapter: Factors
    generals: tuple[Factors, ...]

    @property
    def reads(self) -> tuple[TensorSpec, ...]:
        return tuple(spec for f in (self.task_adapter, *self.generals) for spec in (f.a, f.b))

    @property
    def max_rank(self) -> int:
        return self.task_adapter.rank

    @property
    def foreseen(self) -> dict[str, Any]:
        return {"rank": self.max_rank}

    @property
    def memory(self) -> int:
        return 12 * sum(spec.nbytes for spec in self.reads)

    def compute(self, inputs: Reader) -> TaskResult:
        a, b = self.task_adapter.stored(inputs)
        others = [factors.stored(inputs) for factors in self.generals]
        count = len(others)
        a = a - sum(other for other, _ in others) / count
        b = (b - sum(other for _, other in others) / count) * self.task_adapter.scale
        return TaskResult(self.round_matrices(a, b, self.max_rank), {"rank": self.max_rank})

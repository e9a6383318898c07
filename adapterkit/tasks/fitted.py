"""Tensors of a converted adapter that are made of fits: plain factors of other kinds of deltas."""

import math
from dataclasses import dataclass

from adapterkit.checkpoint.header import TensorSpec
from adapterkit.checkpoint.layout import TensorPlan
from adapterkit.formats.fitted import Fit, FitReader
from adapterkit.formats.modules.tensors import Expression
from adapterkit.plan import Task, TaskResult
from adapterkit.tasks.common import short
from adapterkit.tasks.converted import rounded
from adapterkit.weights.reader import Reader


@dataclass(frozen=True)
class FittedTensors(Task):
    """All tensors that share fits, each fit computed once; the receipt has ‖Δ - b @ a‖ / ‖Δ‖."""

    outputs: tuple[tuple[str, Expression, str], ...]  # key, tensor, dtype
    fits: tuple[Fit, ...]

    @property
    def reads(self) -> tuple[TensorSpec, ...]:
        specs = (spec for _, expression, _ in self.outputs for spec in expression.reads)
        return tuple(dict.fromkeys(specs))

    @property
    def max_outputs(self) -> tuple[TensorPlan, ...]:
        return tuple(TensorPlan(key, dtype, one.shape) for key, one, dtype in self.outputs)

    @property
    def memory(self) -> int:
        made = sum(16 * math.prod(one.shape) for _, one, _ in self.outputs)
        kept = sum(8 * fit.rank * sum(fit.delta.shape) for fit in self.fits)
        return made + kept + max(fit.delta.memory for fit in self.fits)

    def compute(self, inputs: Reader) -> TaskResult:
        reader = FitReader(inputs)
        tensors = {key: rounded(key, one, dtype, reader)[0] for key, one, dtype in self.outputs}
        factors = [reader.factors(fit) for fit in self.fits]
        norm = math.hypot(*(one.norm for one in factors))
        lost = math.hypot(*(one.lost for one in factors))
        metrics = {
            "rank": max(fit.rank for fit in self.fits),
            "norm": short(norm),
            "error": short(lost / norm) if norm else 0.0,
        }
        return TaskResult(tensors, metrics)

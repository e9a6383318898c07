"""Compute the initial factors of a new adapter, EVA's ranks, and the residual base."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import cast

from adapterkit.core import dtypes
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.checkpoint.layout import TensorPlan
from adapterkit.core.errors import Damaged, Problems, listed, unrecoverable
from adapterkit.core.lazy import Tensor, torch
from adapterkit.core.plan import READ, Change, Effort, Metrics, Task, TaskResult
from adapterkit.core.tasks.common import RankedFactors
from adapterkit.core.tasks.handoff import handoff_keys, handoff_of
from adapterkit.core.tasks.metrics import short
from adapterkit.core.weights.codec import QuantizedWeight, decode_checked
from adapterkit.core.weights.parameters import StoredParameter
from adapterkit.core.weights.reader import Reader
from adapterkit.kernels.lowrank import algebra
from adapterkit.kernels.lowrank.algebra import Product
from adapterkit.kernels.quant.stochastic import Draws
from adapterkit.kernels.sums import norm
from adapterkit.verbs.init.methods.eva import distribute
from adapterkit.verbs.init.methods.protocol import (
    ComputedInit,
    DrawnInit,
    Initialization,
    RedistributingInit,
)


@dataclass(frozen=True)
class InitialFactors(RankedFactors):
    """One module's factors by an init, in the dtype of the file. The rounded factors are handed on
    to the files that need them: the residual base, or a copy."""

    method: Initialization
    alpha: float
    scale: float
    seed: int
    # if the method needs it; for a stack all experts
    weight: StoredParameter | None = field(metadata=READ)
    # by kind
    statistics: tuple[tuple[str, TensorSpec], ...] = field(default=(), metadata=READ)
    hands_on: bool = False
    candidates: int = 0  # components in a redistribution of ranks

    @property
    def max_rank(self) -> int:
        return self.candidates or self.rank

    @property
    def handoff_writes(self) -> tuple[str, ...]:
        return handoff_keys(self.name) if self.hands_on else ()

    @property
    def planned_metrics(self) -> Metrics:
        return {"rank": self.rank, "alpha": self.alpha}

    @property
    def effort(self) -> Effort:
        squares = sum(spec.shape[0] ** 3 for kind, spec in self.statistics if kind == "covariance")
        decomposed = {"weight", "gradient"}.intersection(self.method.needs)
        return Effort(wide=squares) + bool(decomposed) * self.decomposition(self.rank)

    @property
    def memory(self) -> int:
        matrix = 0
        if self.weight is not None:
            matrix = math.prod(self.weight.shape) // (self.place.experts or 1)
        statistics = sum(math.prod(spec.shape) for _, spec in self.statistics)
        factors = sum(math.prod(stored.shape) for stored in self.max_outputs)
        # the trailing triplets are of an inverse, in float64
        return 56 * matrix + 32 * statistics + 12 * factors

    def compute(self, inputs: Reader) -> TaskResult:
        statistics = {kind: inputs.tensor(spec) for kind, spec in self.statistics}
        taken, size, pairs = 0.0, 0.0, []
        for expert in range(self.place.experts or 1):
            matrix = self._matrix(inputs, expert)
            a, b = self._factors(matrix, statistics, expert)
            pairs.append((a, b))
            if matrix is not None:
                product = Product(b.double() * self.scale, a.double())
                taken = math.hypot(taken, algebra.norm(product))
                size = math.hypot(size, norm(matrix))
        tensors = self.round(self.place.stored(pairs))
        metrics: Metrics = {"rank": self.rank, "alpha": self.alpha}
        if self.method.changes_base:
            metrics["taken"] = short(taken / size) if size else 0.0
        if isinstance(self.method, RedistributingInit):
            variances, variance = statistics["variances"], statistics["variance"]
            metrics["ratios"] = self.method.ratios(self.candidates, variances, variance)
        handoff = handoff_of(self.name, *tensors.values()) if self.hands_on else {}
        return TaskResult(tensors, metrics, handoff)

    def _matrix(self, inputs: Reader, expert: int) -> Tensor | None:
        if self.weight is None:
            return None
        weight = self.weight if self.place.experts is None else self.weight.expert(expert)
        return weight.matrix(inputs).contiguous()

    def _factors(
        self, matrix: Tensor | None, statistics: dict[str, Tensor], expert: int
    ) -> tuple[Tensor, Tensor]:
        """a (rank, in) and b (out, rank), a kernel's axes flattened."""
        # whatever other modules draw, and in whatever order
        seed = Draws.of(self.seed, f"{self.name} {expert}").key >> 1
        generator = torch.Generator().manual_seed(seed)
        method = self.method
        if isinstance(method, ComputedInit):
            return self._computed(method, matrix, statistics, generator)
        assert isinstance(method, DrawnInit)
        a_shape, b_shape = (self.rank, *self.place.a_tail), (self.place.out, self.rank)
        a, b = method.start(a_shape, b_shape, generator, self.place.is_embedding)
        return a.reshape(self.rank, -1), b

    def _computed(
        self,
        method: ComputedInit,
        matrix: Tensor | None,
        statistics: dict[str, Tensor],
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        """The factors by a method that needs the weight or statistics; `Unrecoverable` for
        statistics that it cannot use."""
        if matrix is None:
            matrix = torch.empty(self.place.out, math.prod(self.place.a_tail), device="meta")
        start = lambda: method.start(matrix, self.max_rank, self.scale, statistics, generator)
        if not self.statistics:
            return start()
        with unrecoverable(
            ", ".join(spec.key for _, spec in self.statistics),
            expected="statistics of this module's inputs and gradients",
            where=self.statistics[0][1].file,
            hint="collect them on texts that reach this module, and store them in float32",
            code="AK106",
        ):
            return start()


@dataclass(frozen=True)
class ResidualWeight(Task):
    """W - scale·b@a, quantized or in the dtype of W; the module's own task hands a and b on."""

    source: TensorSpec = field(metadata=READ)
    packed: QuantizedWeight | None
    module: str
    scale: float
    transposed: bool

    @property
    def handoff_reads(self) -> tuple[str, ...]:
        return handoff_keys(self.module)

    @property
    def max_outputs(self) -> tuple[TensorPlan, ...]:
        if self.packed is not None:
            return self.packed.max_outputs
        return (TensorPlan(self.source.key, self.source.dtype, self.source.shape),)

    @property
    def effort(self) -> Effort:
        return Effort(encoded=2 * math.prod(self.source.shape) if self.packed else 0)

    @property
    def memory(self) -> int:
        return 24 * math.prod(self.source.shape)

    def compute(self, inputs: Reader) -> TaskResult:
        weight = inputs.tensor(self.source)
        a, b = (inputs.handoff(key).float() for key in self.handoff_reads)
        part = (b * self.scale) @ a
        part = part.T if self.transposed else part
        size = norm(weight) or 1.0
        rest, metrics = weight - part, Metrics()
        if self.packed is None:
            stored = rest.to(dtypes.torch_dtype(self.source.dtype))
            metrics["error"] = short(norm(stored.float() - rest) / size)
            return TaskResult({self.source.key: stored}, metrics)
        plain = decode_checked(self.packed, self.packed.encode(weight))
        metrics["error_plain"] = short(norm(plain.sub_(weight)) / size)
        tensors = self.packed.encode(rest)
        metrics["error"] = short(norm(decode_checked(self.packed, tensors).sub_(rest)) / size)
        return TaskResult(tensors, metrics)


DROPPED = "dropped"  # metric of a module that gets no rank


def with_candidates(
    method: RedistributingInit, tasks: Sequence[InitialFactors]
) -> list[InitialFactors]:
    """The tasks with as many components as the redistribution can use; those that share statistics
    have the same number.

    `Refused` or `Damaged` with all modules that have too few components."""
    statistics = [dict(task.statistics) for task in tasks]
    most = method.candidates(
        (specs["components"].key, task.rank, task.place.a_tail[0])
        for specs, task in zip(statistics, tasks, strict=True)
    )
    errors, result = Problems(code="AK106"), []
    for specs, task in zip(statistics, tasks, strict=True):
        components, variances = specs["components"], specs["variances"].shape
        stored, count = components.shape[0], most[components.key]
        if variances != (stored,):
            errors.add(
                f"{specs['variances'].key} has shape {variances} for {stored} components",
                "one variance for each component",
                "collect them on this model",
                where=components.file,
                kind=Damaged,
            )
        if stored < count:
            errors.append(method.too_few(task.name, task.rank, stored, count, components.file))
        result.append(replace(task, candidates=count))
    errors.raise_all()
    return result


def redistribute(
    method: RedistributingInit, tasks: Sequence[Task], metrics: list[Metrics]
) -> list[Change]:
    """Give each module its rank once the ratios of all modules are known."""
    factors = [cast(InitialFactors, task) for task in tasks]
    budget = sum(task.rank for task in factors)
    ranks = distribute([metric["ratios"] for metric in metrics], budget)
    return [partial(_cut, method, task, rank) for task, rank in zip(factors, ranks, strict=True)]


def _cut(
    method: RedistributingInit, task: InitialFactors, rank: int, result: TaskResult
) -> TaskResult:
    """The first `rank` components; nothing for a module without a rank."""
    if not rank:
        return TaskResult({}, {DROPPED: True})
    a, b = task.place.pair(result.tensors)
    ratios = result.metrics["ratios"]
    metrics = {
        "rank": rank,
        "alpha": method.new_alpha(task.alpha, task.rank, rank),
        "explained": short(sum(ratios[:rank])),
    }
    tensors = task.place.keyed(a[:rank].contiguous(), b[:, :rank].contiguous())
    return TaskResult(tensors, metrics)


def warn_of_dropped(metrics: dict[str, dict]) -> list[str]:
    """Warnings about modules without a rank."""
    dropped = [name for name, metric in metrics.items() if metric.get(DROPPED)]
    if not dropped:
        return []
    return [f"no factors for {listed(dropped)}: other modules' components explain more"]

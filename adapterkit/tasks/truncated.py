"""Factors of the best approximation of each module's delta, and the ranks at which they are
truncated."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from torch import Tensor

from adapterkit import dtypes
from adapterkit.adapters.factors import Factors
from adapterkit.adapters.kinds.common import Delta
from adapterkit.checkpoint.header import TensorSpec
from adapterkit.checkpoint.layout import laid_out
from adapterkit.errors import Refused
from adapterkit.kernels import lowrank
from adapterkit.kernels.lowrank import Svd
from adapterkit.options import parse_size
from adapterkit.plan import Change, Finalize, Task, TaskResult, unchanged
from adapterkit.tasks.common import FactorsTask, short
from adapterkit.weights.reader import Reader

FLOAT_NOISE = 1e-6  # of the largest singular value: below it, float32 factors hold nothing
# with --max-size no module gets more than this many times the rank that all could have alike:
# bounds the work
SHARES = 8


@dataclass(frozen=True)
class Truncation:
    """Which rank: a number, a share of the energy, a ratio to the largest singular value, or a size
    of the file for all modules."""

    rank: int | None = None
    energy: float | None = None
    sv_ratio: float | None = None
    max_size: str | int | None = None

    def rank_for(self, s: Tensor, total: float) -> int:
        """The rank for these singular values, falling, of which Σ s² over all is `total`.

        With `max_size` that of all values above the noise: `finalize_by_size` decides then.
        """
        if self.rank is not None:
            return min(self.rank, len(s))
        if self.energy is not None:
            return min(lowrank.rank_for_energy(s, self.energy, total), len(s))
        if self.sv_ratio is not None:
            return max(1, int((s * self.sv_ratio >= s[0]).sum())) if s[0] > 0 else 1
        return max(1, int((s > s[0] * FLOAT_NOISE).sum()))

    def max_rank(self, full: int) -> int:
        """The largest rank that a delta of full rank `full` can get."""
        return min(self.rank, full) if self.rank is not None else full


def check_truncation(truncation: Truncation) -> None:
    """Raises `Refused` unless exactly one way to choose the rank is given."""
    given = [
        "--" + name.replace("_", "-")
        for name, value in vars(truncation).items()
        if value is not None
    ]
    if len(given) != 1:
        raise Refused(
            " and ".join(given) or "no rank",
            expected="one of --rank, --energy, --sv-ratio or --max-size",
            where="options",
            hint="give one of them",
        )


@dataclass(frozen=True, kw_only=True)
class FittedFactors(FactorsTask):
    """Factors of the best approximation of one module's delta of the rank that `truncation`
    says."""

    truncation: Truncation
    alpha: float | None = None  # the config's lora_alpha, compensated in b; None: the scale is 1

    @abstractmethod
    def decompose(self, inputs: Reader) -> list[tuple[Svd, float]]:
        """The leading singular triplets, and Σ s² of all, of the delta, or of each expert's."""

    def compute(self, inputs: Reader) -> TaskResult:
        return self.fit(self.decompose(inputs))

    def fit(self, svds: Sequence[tuple[Svd, float]]) -> TaskResult:
        """The factors, of several experts at the largest of their ranks, and what they lose."""
        rank = max(self.truncation.rank_for(svd.s, total) for svd, total in svds)
        tensors = self.place.stored([lowrank.refit(svd, rank) for svd, _ in svds])
        if self.alpha is not None:
            tensors[self.place.b_key] = tensors[self.place.b_key] * (rank / self.alpha)
        energy = math.fsum(float(svd.s[:rank].double().square().sum()) for svd, _ in svds)
        total = math.fsum(total for _, total in svds)
        metrics: dict[str, Any] = {"rank": rank, **fit_metrics(energy, total)}
        if self.truncation.max_size is not None:
            metrics["spectrum"] = [
                math.fsum(float(svd.s[i]) ** 2 for svd, _ in svds if i < len(svd.s)) ** 0.5
                for i in range(rank)
            ]
            metrics["total"] = total
        return TaskResult(self.round(tensors), metrics)


def fit_metrics(energy: float, total: float) -> dict[str, float]:
    """The delta's norm, the share of its energy (Σ s²) that the factors have, and their relative
    error."""
    share = min(energy / total, 1.0) if total else 1.0
    return {"norm": short(total**0.5), "energy": short(share), "error": short((1 - share) ** 0.5)}


@dataclass(frozen=True)
class TruncatedFactors(FittedFactors):
    """Of a delta that is stored as factors."""

    factors: Factors

    @property
    def reads(self) -> tuple[TensorSpec, ...]:
        return (self.factors.a, self.factors.b)

    @property
    def max_rank(self) -> int:
        return self.truncation.max_rank(min(self.factors.rank, *self.factors.shape))

    @property
    def memory(self) -> int:
        return 12 * sum(spec.nbytes for spec in self.reads)

    def decompose(self, inputs: Reader) -> list[tuple[Svd, float]]:
        svds = [lowrank.svd(product) for product in self.factors.products(inputs)]
        return [(svd, float(svd.s.square().sum())) for svd in svds]


@dataclass(frozen=True)
class ConvertedFactors(FittedFactors):
    """Of the delta of another type of adapter."""

    delta: Delta
    limit: int | None = None  # of the rank

    @property
    def reads(self) -> tuple[TensorSpec, ...]:
        return self.delta.reads

    @property
    def max_rank(self) -> int:
        full = min(self.delta.rank, *self.delta.shape)
        return self.truncation.max_rank(min(self.limit or full, full))

    @property
    def memory(self) -> int:
        return self.delta.memory

    def decompose(self, inputs: Reader) -> list[tuple[Svd, float]]:
        return [self.delta.leading_triplets(inputs, self.max_rank, self.truncation.energy)]


def even_rank(truncation: Truncation, tasks: Sequence[Task]) -> int:
    """The rank that all modules could have alike in a file of the size that is given."""
    size = parse_size("max_size", truncation.max_size)
    return max(1, size // max(sum(map(_rank_nbytes, tasks)), 1))


def finalize_by_size(truncation: Truncation, tasks: Sequence[Task]) -> Finalize:
    """Give each module its rank once all singular values are known: the largest of all modules
    count while the file has room.

    Raises `Refused` where not even rank 1 for each fits.
    """
    most = [stored for task in tasks for stored in task.max_outputs]
    header = len(laid_out("", most, {"format": "pt"}, ordered=True).header)
    costs = [_rank_nbytes(task) for task in tasks]
    others = sum(
        stored.nbytes
        for task, cost in zip(tasks, costs, strict=True)
        if not cost
        for stored in task.max_outputs
    )
    limit = parse_size("max_size", truncation.max_size)
    budget = limit - header - others - sum(costs)
    if budget < 0:
        raise Refused(
            f"--max-size {truncation.max_size}",
            expected=f"at least {limit - budget:,} bytes: rank 1 for each module",
            where="options",
            hint="give a larger size, or fewer modules",
        )
    return partial(_spend, budget, costs, tasks)


def _spend(
    budget: int, costs: Sequence[int], tasks: Sequence[Task], metrics: list[dict]
) -> list[Change]:
    """Ranks for `budget` bytes beyond rank 1; `costs`: bytes of one rank of each task."""
    # an unchanged weight has no factors, and leaves its room to the others
    has_rank = [
        cost > 0 and "spectrum" in metric for cost, metric in zip(costs, metrics, strict=True)
    ]
    ranks = [1] * len(tasks)
    budget += sum(cost for cost, has in zip(costs, has_rank, strict=True) if not has)
    values = [
        (s, i) for i, metric in enumerate(metrics) if has_rank[i] for s in metric["spectrum"][1:]
    ]
    for value, i in sorted(values, key=lambda pair: -pair[0]):
        if value > 0 and costs[i] <= budget:
            ranks[i] += 1
            budget -= costs[i]
    return [
        partial(_truncate, cast(FittedFactors, task), rank) if has else unchanged
        for task, rank, has in zip(tasks, ranks, has_rank, strict=True)
    ]


def _rank_nbytes(task: Task) -> int:
    """Bytes of one rank of a task's factors; 0 for what has no rank."""
    if not isinstance(task, FittedFactors):
        return 0
    a, b = task.place.shapes(1)
    return dtypes.size(task.dtype, math.prod(a) + math.prod(b))


def _truncate(task: FittedFactors, rank: int, result: TaskResult) -> TaskResult:
    """The first `rank` of the rank-one parts, which come in the order of their singular values."""
    metrics = dict(result.metrics)
    before, spectrum, total = metrics["rank"], metrics.pop("spectrum"), metrics.pop("total")
    energy = math.fsum(value**2 for value in spectrum[:rank])
    place = task.place
    a, b = (cast(Tensor, result.tensors[key]) for key in (place.a_key, place.b_key))
    experts = place.experts or 1
    a = a.reshape(experts, before, *a.shape[1:])[:, :rank].reshape(experts * rank, *a.shape[1:])
    b = b.reshape(b.shape[0], before, experts, *b.shape[2:])[:, :rank]
    b = b.reshape(b.shape[0], rank * experts, *b.shape[3:])
    if task.alpha is not None:
        b = (b.float() * (rank / before)).to(b.dtype)
    return TaskResult(
        {place.a_key: a, place.b_key: b}, metrics | {"rank": rank} | fit_metrics(energy, total)
    )

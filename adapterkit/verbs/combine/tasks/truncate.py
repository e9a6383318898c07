"""Factors of the best approximation of each module's delta, and the ranks to which they are
truncated."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar, cast

from adapterkit.core import dtypes
from adapterkit.core.adapter.factors import Factors
from adapterkit.core.checkpoint.fingerprint import metadata_with
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.checkpoint.layout import laid_out
from adapterkit.core.checkpoint.spec import Checkpoint
from adapterkit.core.errors import Problems, listed
from adapterkit.core.lazy import Tensor
from adapterkit.core.options import bytes_text
from adapterkit.core.plan import READ, Change, Finalize, Metrics, Task, TaskResult, unchanged
from adapterkit.core.tasks.common import FactorsTask
from adapterkit.core.tasks.metrics import short
from adapterkit.core.weights.reader import Reader
from adapterkit.kernels.lowrank import algebra, weighted
from adapterkit.kernels.lowrank.algebra import Product
from adapterkit.verbs.shared.options import TruncationOptions
from adapterkit.verbs.shared.statistics_file import read_root, root_memory, select_covariances

if TYPE_CHECKING:
    from adapterkit.adapters.kinds.common import Delta

F = TypeVar("F", bound="FittedFactors")
BY_WEIGHTS = "fitted in the norm of their weights"
FLOAT_NOISE = 1e-6  # of the largest singular value: below it, float32 factors hold nothing
SHARES = 8  # times the rank that all modules could have alike


def rank_for(truncation: TruncationOptions, s: Tensor, total: float) -> int:
    """The rank for these falling singular values; `total`: Σ s² over all.

    With `max_size`, the rank of all values above the noise: `finalize_by_size` decides later."""
    if truncation.rank is not None:
        return min(truncation.rank, len(s))
    if truncation.energy is not None:
        return min(algebra.rank_for_energy(s, truncation.energy, total), len(s))
    if truncation.sv_ratio is not None:
        return max(1, int((s * truncation.sv_ratio >= s[0]).sum())) if s[0] > 0 else 1
    return max(1, int((s > s[0] * FLOAT_NOISE).sum()))


@dataclass(frozen=True, kw_only=True)
class FittedFactors(FactorsTask):
    """Factors of the best approximation of one module's delta at the rank of `truncation`, in the
    norm of the module's outputs if the covariance of the inputs is known."""

    truncation: TruncationOptions
    alpha: float | None = None  # the config's lora_alpha, compensated in b; None: the scale is 1
    covariance: TensorSpec | None = field(default=None, metadata=READ)  # of a module with one delta
    limit: int | None = None  # of the rank

    @property
    @abstractmethod
    def full_rank(self) -> int:
        """The largest rank that the delta can have."""

    @property
    def max_rank(self) -> int:
        full = self.full_rank
        return self.truncation.max_rank(min(self.limit or full, full))

    def fit(
        self, decompositions: Sequence[weighted.Decomposition], more: Mapping[str, float]
    ) -> TaskResult:
        """The factors for the delta's decomposition (several experts: at the largest of their
        ranks), their errors, and `more` metrics."""
        rank = max(rank_for(self.truncation, one.svd.s, one.total) for one in decompositions)
        tensors = self.place.stored([one.factors(rank) for one in decompositions])
        if self.alpha is not None:
            tensors[self.place.b_key] = tensors[self.place.b_key] * (rank / self.alpha)
        energies = energies_of(decompositions, rank)
        metrics: Metrics = {"rank": rank, **fit_metrics(energies, rank), **more}
        if self.truncation.max_size is not None:
            metrics["energies"] = energies
        return TaskResult(self.round(tensors), metrics)


# by the error's name: the squared norms of the rank-one terms, and of their sum
Squares = dict[str, tuple[list[float], float]]


def energies_of(decompositions: Sequence[weighted.Decomposition], rank: int) -> Squares:
    """The energies of all decompositions together, up to that rank; first those in the norm of the
    fit."""
    tables = [one.energies for one in decompositions]
    return {name: _sum([table[name] for table in tables], rank) for name in tables[0]}


def _sum(energies: Sequence[weighted.Energies], rank: int) -> tuple[list[float], float]:
    rows = [one.parts[:rank].tolist() for one in energies]
    parts = [math.fsum(row[i] for row in rows if i < len(row)) for i in range(rank)]
    return parts, math.fsum(one.total for one in energies)


def fit_metrics(energies: Squares, rank: int) -> dict[str, float]:
    """The delta's norm, the share of the energy that factors of that rank keep, and relative
    errors: ‖Δ - b·a‖ / ‖Δ‖, with statistics also ‖(Δ - b·a) C^½‖ / ‖Δ C^½‖ (`output_error`, then
    also the norm of the energy) and both errors of the best factors without statistics."""
    shares = {
        name: min(math.fsum(parts[:rank]) / total, 1.0) if total else 1.0
        for name, (parts, total) in energies.items()
    }
    metrics = {"norm": short(energies["error"][1] ** 0.5), "energy": next(iter(shares.values()))}
    metrics["energy"] = short(metrics["energy"])
    return metrics | {name: short((1 - share) ** 0.5) for name, share in shares.items()}


@dataclass(frozen=True)
class TruncatedFactors(FittedFactors):
    """Fitted factors of a delta that is stored as factors."""

    factors: Factors = field(metadata=READ)

    @property
    def full_rank(self) -> int:
        return min(self.factors.rank, *self.factors.shape)

    @property
    def planned_metrics(self) -> Metrics | None:
        return None if self.truncation.rank is None else {"rank": self.max_rank}

    @property
    def memory(self) -> int:
        factors = self.factors.a.nbytes + self.factors.b.nbytes
        return (12 if self.covariance is None else 30) * factors + root_memory(self.covariance)

    def compute(self, inputs: Reader) -> TaskResult:
        root, damping = read_root(inputs, self.covariance)
        products = self.factors.products(inputs)
        return self.fit([weighted.decompose_product(one, root) for one in products], damping)


@dataclass(frozen=True)
class ConvertedFactors(FittedFactors):
    """Fitted factors of a delta of another type of adapter."""

    delta: Delta = field(metadata=READ)

    @property
    def full_rank(self) -> int:
        return min(self.delta.rank, *self.delta.shape)

    @property
    def memory(self) -> int:
        if self.covariance is None:
            return self.delta.memory
        return 2 * self.delta.memory + root_memory(self.covariance)

    def compute(self, inputs: Reader) -> TaskResult:
        root, damping = read_root(inputs, self.covariance)
        return self.fit([self._decompose(inputs, root)], damping)

    def _decompose(self, inputs: Reader, root: Tensor | None) -> weighted.Decomposition:
        most, energy = self.max_rank, self.truncation.energy
        if root is None:
            return weighted.Decomposition(*self.delta.leading_triplets(inputs, most, energy))
        delta = self.delta.value(inputs)
        if isinstance(delta, Product):
            return weighted.decompose_product(delta, root)
        return weighted.decompose_dense(delta, most, energy, root=root)


def in_output_norms(
    tasks: list[F], stats: Checkpoint, parameters: Collection[str], notes: list[str]
) -> list[F]:
    """The tasks, with the covariance of their inputs for linear layers.

    `parameters`: names of factors of single parameters. Layers that are not linear join the notes.
    `Refused` with all covariances that are missing or of another shape."""
    selected = select_covariances(stats, input_widths(tasks, parameters, notes, BY_WEIGHTS))
    return [replace(task, covariance=selected.get(task.name)) for task in tasks]


def input_widths(
    tasks: Sequence[FactorsTask], parameters: Collection[str], notes: list[str], otherwise: str
) -> dict[str, int]:
    """The widths of the inputs of linear layers; a note says how others are fitted."""
    widths = {
        task.name: task.place.a_tail[0]
        for task in tasks
        if task.name not in parameters and task.place.is_linear
    }
    if not widths:
        problem, expected = "no linear layers with factors", "some: statistics are of their inputs"
        Problems(where="--stats", code="AK106").fail(problem, expected, "remove --stats")
    others = [task.name for task in tasks if task.name not in widths]
    if others:
        notes.append(
            f"{len(others)} of {len(tasks)} modules are no linear layers (embeddings, "
            f"convolutions, parameters), and {otherwise}: {listed(others)}"
        )
    return widths


def within_shares(tasks: list[F], truncation: TruncationOptions) -> list[F]:
    """The tasks of dense deltas. With --max-size, none has a rank above SHARES times the even rank,
    which bounds the work."""
    if not truncation.max_size:
        return tasks
    even_rank = max(1, truncation.size // max(sum(map(_rank_nbytes, tasks)), 1))
    limit = SHARES * even_rank
    limited = lambda task: isinstance(task, TruncatedFactors)
    return [task if limited(task) else replace(task, limit=limit) for task in tasks]


def finalize_by_size(
    truncation: TruncationOptions, tasks: Sequence[Task], made_for: str | None = None
) -> Finalize:
    """Give each module its rank once all singular values are known: the largest of all modules
    count as long as the file stays within its size. `made_for`: the base's fingerprint, in its
    header.

    Raises `Refused` if not even rank 1 for each fits."""
    most = [stored for task in tasks for stored in task.max_outputs]
    header = len(laid_out("", most, metadata_with(made_for), ordered=True).header)
    costs = [_rank_nbytes(task) for task in tasks]
    others = sum(
        stored.nbytes
        for task, cost in zip(tasks, costs, strict=True)
        if not cost
        for stored in task.max_outputs
    )
    limit = truncation.size
    budget = limit - header - others - sum(costs)
    if budget < 0:
        parts = [f"rank 1 of {sum(map(bool, costs))} modules takes {bytes_text(sum(costs))}"]
        parts += [f"values saved in full take {bytes_text(others)}"] * bool(others)
        Problems(where="options", code="AK108").fail(
            f"--max-size {bytes_text(limit)} is too small: {', '.join(reversed(parts))}",
            f"at least {limit - budget:,} bytes",
            "give a larger size" + ", or --rest drop" * bool(others) + ", or fewer modules",
        )
    return partial(_spend, budget, costs, tasks)


def _spend(
    budget: int, costs: Sequence[int], tasks: Sequence[Task], metrics: list[dict]
) -> list[Change]:
    """Ranks for `budget` bytes beyond rank 1; `costs`: bytes of one rank of each task."""
    # an unchanged weight has no factors, and leaves its bytes to the others
    has_rank = [cost > 0 and "energies" in one for cost, one in zip(costs, metrics, strict=True)]
    ranks = [1] * len(tasks)
    budget += sum(cost for cost, has in zip(costs, has_rank, strict=True) if not has)
    values = [
        (square, i)
        for i, metric in enumerate(metrics)
        if has_rank[i]
        for square in next(iter(metric["energies"].values()))[0][1:]
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
    """Bytes of one rank of a task's factors; 0 for a task without rank."""
    if not isinstance(task, FittedFactors):
        return 0
    a, b = task.place.shapes(1)
    return dtypes.size(task.dtype, math.prod(a) + math.prod(b))


def _truncate(task: FittedFactors, rank: int, result: TaskResult) -> TaskResult:
    """The first `rank` rank-one terms, which come in the order of their singular values."""
    metrics = dict(result.metrics)
    before, energies = metrics["rank"], metrics.pop("energies")
    place = task.place
    a, b = place.pair(result.tensors)
    experts = place.experts or 1
    a = a.reshape(experts, before, *a.shape[1:])[:, :rank].reshape(experts * rank, *a.shape[1:])
    b = b.reshape(b.shape[0], before, experts, *b.shape[2:])[:, :rank]
    b = b.reshape(b.shape[0], rank * experts, *b.shape[3:])
    if task.alpha is not None:
        b = (b.float() * (rank / before)).to(b.dtype)
    metrics |= {"rank": rank} | fit_metrics(energies, rank)
    return TaskResult(place.keyed(a, b), metrics)

"""How many singular values of each module are kept, and the factors that come of it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from torch import Tensor

from adapterkit import dtypes
from adapterkit.adapters.factors import Factors, Place
from adapterkit.adapters.kinds.common import Delta
from adapterkit.checkpoint.header import TensorSpec
from adapterkit.checkpoint.layout import Stored, laid_out
from adapterkit.errors import Refused
from adapterkit.kernels import lowrank
from adapterkit.kernels.lowrank import Svd
from adapterkit.options import parse_size
from adapterkit.plan import Change, Finalize, Task, TaskResult, unchanged
from adapterkit.tasks import common
from adapterkit.tasks.common import short
from adapterkit.weights.reader import Reader

FLOAT_NOISE = 1e-6  # of the largest singular value: below it, float32 factors hold nothing


@dataclass(frozen=True)
class Cut:
    """Which rank: a number, a share of the energy, a ratio to the largest singular value, or a size of the file for all of them."""

    rank: int | None = None
    energy: float | None = None
    sv_ratio: float | None = None
    max_size: str | int | None = None

    def of(self, s: Tensor, total: float) -> int:
        """The rank for these singular values, falling, of which Σ s² over all is `total`."""
        if self.rank is not None:
            return min(self.rank, len(s))
        if self.energy is not None:
            return min(lowrank.rank_for_energy(s, self.energy, total), len(s))
        if self.sv_ratio is not None:
            return max(1, int((s * self.sv_ratio >= s[0]).sum())) if s[0] > 0 else 1
        return max(
            1, int((s > s[0] * FLOAT_NOISE).sum())
        )  # all that is there: the size decides later

    def most(self, whole: int) -> int:
        return min(self.rank, whole) if self.rank is not None else whole


def check_cut(cut: Cut) -> None:
    """`Refused` unless exactly one way to choose the rank is given."""
    given = [name for name, value in vars(cut).items() if value is not None]
    words = "--rank, --energy, --sv-ratio or --max-size"
    if len(given) != 1:
        found = " and ".join("--" + name.replace("_", "-") for name in given) or "no rank"
        raise Refused(found, expected=f"one of {words}", where="options", hint="give one of them")


@dataclass(frozen=True)
class TruncatedFactors:
    """One module's factors at the rank that `cut` gives; its delta is read as factors."""

    name: str
    factors: Factors
    place: Place
    cut: Cut
    dtype: str
    alpha: float | None = None  # None: scale 1; else the config's lora_alpha, made up for in b

    @property
    def reads(self) -> tuple[TensorSpec, ...]:
        return (self.factors.a, self.factors.b)

    @property
    def max_outputs(self) -> tuple[Stored, ...]:
        whole = min(self.factors.rank, *self.factors.shape)
        return common.bounds(self.place, self.cut.most(whole), self.dtype)

    @property
    def memory(self) -> int:
        return 12 * sum(spec.nbytes for spec in self.reads)

    def compute(self, inputs: Reader) -> TaskResult:
        svds = [lowrank.svd(product) for product in self.factors.products(inputs)]
        return ranked(self, [(svd, float(svd.s.square().sum())) for svd in svds])


@dataclass(frozen=True)
class ConvertedFactors:
    """One module's factors at the rank that `cut` gives; its delta is that of another type of adapter."""

    name: str
    delta: Delta
    place: Place
    cut: Cut
    dtype: str
    alpha: float | None = None
    limit: int | None = None  # of the rank

    @property
    def reads(self) -> tuple[TensorSpec, ...]:
        return self.delta.reads

    @property
    def max_outputs(self) -> tuple[Stored, ...]:
        return common.bounds(self.place, self._most_rank(), self.dtype)

    @property
    def memory(self) -> int:
        return self.delta.memory

    def _most_rank(self) -> int:
        whole = min(self.delta.rank, *self.delta.shape)
        return self.cut.most(min(self.limit or whole, whole))

    def compute(self, inputs: Reader) -> TaskResult:
        return ranked(self, [self.delta.leading(inputs, self._most_rank(), self.cut.energy)])


def ranked(task: Any, found: Sequence[tuple[Svd, float]]) -> TaskResult:
    """Factors of the rank that the task's cut gives (of several experts: the largest of theirs), and what that loses."""
    rank = max(task.cut.of(svd.s, total) for svd, total in found)
    pairs = [lowrank.refit(svd, rank) for svd, _ in found]
    metrics: dict[str, Any] = {"rank": rank, **_losses(found, rank)}
    if task.cut.max_size is not None:
        metrics["spectrum"] = [
            math.fsum(float(svd.s[i]) ** 2 for svd, _ in found if i < len(svd.s)) ** 0.5
            for i in range(rank)
        ]
        metrics["total"] = math.fsum(total for _, total in found)
    return TaskResult(_scaled(task, task.place.stored(pairs), rank), metrics)


def _losses(found: Sequence[tuple[Svd, float]], rank: int) -> dict[str, float]:
    kept = math.fsum(float(svd.s[:rank].double().square().sum()) for svd, _ in found)
    return measured(kept, math.fsum(total for _, total in found))


def measured(kept: float, total: float) -> dict[str, float]:
    """Share of the energy kept, relative error, and the delta's norm."""
    share = min(kept / total, 1.0) if total else 1.0
    return {"norm": short(total**0.5), "energy": short(share), "error": short((1 - share) ** 0.5)}


def _scaled(task: Any, tensors: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    dtype = dtypes.torch_dtype(task.dtype)
    factor = 1.0 if task.alpha is None else rank / task.alpha
    return {
        key: (t * factor if key == task.place.b_key else t).to(dtype) for key, t in tensors.items()
    }


def even_rank(cut: Cut, tasks: Sequence[Task]) -> int:
    """The rank that all ranked tasks could have alike in a file of the cut's size."""
    return max(1, parse_size("max_size", cut.max_size) // max(sum(map(_cost, tasks)), 1))


def finalize_by_size(cut: Cut, tasks: Sequence[Task]) -> Finalize:
    """Give each module its rank once all singular values are known: the largest of all modules count while the file has room.

    `Refused` where not even rank 1 for each fits.
    """
    most = [stored for task in tasks for stored in task.max_outputs]
    header = len(laid_out("", most, {"format": "pt"}, ordered=True).header)
    costs = [_cost(task) for task in tasks]
    others = sum(
        s.nbytes
        for task, cost in zip(tasks, costs, strict=True)
        if not cost
        for s in task.max_outputs
    )
    limit = parse_size("max_size", cut.max_size)
    budget = limit - header - others - sum(costs)
    if budget < 0:
        raise Refused(
            f"--max-size {cut.max_size}",
            expected=f"at least {limit - budget:,} bytes: rank 1 for each module",
            where="options",
            hint="give a larger size, or leave modules out",
        )

    return partial(_spend, budget, costs, tasks)


def _spend(
    budget: int, costs: Sequence[int], tasks: Sequence[Task], metrics: list[dict]
) -> list[Change]:
    """Ranks for `budget` bytes beyond rank 1; `costs`: bytes of one rank of each task."""
    # an unchanged weight has no factors, and leaves its room to the others
    ranked = [
        cost > 0 and "spectrum" in metric for cost, metric in zip(costs, metrics, strict=True)
    ]
    ranks = [1] * len(tasks)
    budget += sum(cost for cost, has_rank in zip(costs, ranked, strict=True) if not has_rank)
    values = [
        (s, i) for i, metric in enumerate(metrics) if ranked[i] for s in metric["spectrum"][1:]
    ]
    for value, i in sorted(values, key=lambda pair: -pair[0]):
        if value > 0 and costs[i] <= budget:
            ranks[i] += 1
            budget -= costs[i]
    return [
        partial(_truncate, task, rank) if has_rank else unchanged
        for task, rank, has_rank in zip(tasks, ranks, ranked, strict=True)
    ]


def _cost(task: Any) -> int:
    """Bytes of one rank of a task's factors; 0 for what has no rank."""
    if not hasattr(task, "place"):
        return 0
    a, b = task.place.shapes(1)
    return dtypes.size(task.dtype, math.prod(a) + math.prod(b))


def _truncate(task: Any, rank: int, result: TaskResult) -> TaskResult:
    """The first `rank` of the rank-one parts, which come in the order of their singular values."""
    metrics = dict(result.metrics)
    before, spectrum, total = metrics["rank"], metrics.pop("spectrum"), metrics.pop("total")
    kept = math.fsum(value**2 for value in spectrum[:rank])
    a, b = (cast(Tensor, result.tensors[key]) for key in (task.place.a_key, task.place.b_key))
    experts = task.place.experts or 1
    a = a.reshape(experts, before, *a.shape[1:])[:, :rank].reshape(experts * rank, *a.shape[1:])
    b = b.reshape(b.shape[0], before, experts, *b.shape[2:])[:, :rank]
    b = b.reshape(b.shape[0], rank * experts, *b.shape[3:])
    if task.alpha is not None:
        b = (b.float() * (rank / before)).to(b.dtype)
    return TaskResult(
        {task.place.a_key: a, task.place.b_key: b},
        metrics | {"rank": rank} | measured(kept, total),
    )


SHARES = 8  # with --max-size no module gets more than this many times the rank that all could have alike: bounds the work

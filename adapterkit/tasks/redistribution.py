"""EVA's ranks: the components of all modules that explain most of their layers' variance."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, cast

from torch import Tensor

from adapterkit.checkpoint.header import TensorSpec
from adapterkit.errors import AdapterkitError, Damaged, Problems, listed
from adapterkit.inits.eva import distribute
from adapterkit.inits.protocol import RedistributingInit
from adapterkit.plan import Change, Finalize, Task, TaskResult
from adapterkit.tasks.common import short
from adapterkit.tasks.initial import InitialFactors
from adapterkit.weights.reader import Reader

DROPPED = "dropped"  # metric of a module that gets no rank


@dataclass(frozen=True)
class CandidateFactors(InitialFactors):
    """One module's factors with all components that take part in the redistribution."""

    method: RedistributingInit
    candidates: int = 0

    @property
    def max_rank(self) -> int:
        return self.candidates

    def compute(self, inputs: Reader) -> TaskResult:
        result = super().compute(inputs)
        variances, variance = (inputs.tensor(self.specs[k]) for k in ("variances", "variance"))
        ratios = self.method.ratios(self.candidates, variances, variance)
        return TaskResult(result.tensors, result.metrics | {"ratios": ratios})

    @property
    def specs(self) -> dict[str, TensorSpec]:
        return dict(self.statistics)


def with_candidates(
    method: RedistributingInit, tasks: Sequence[InitialFactors]
) -> list[CandidateFactors]:
    """The tasks with as many components as can take part; those that share statistics have the
    same.

    `Refused` or `Damaged` with all modules of which there are not enough components.
    """
    keys = [dict(task.statistics)["components"].key for task in tasks]
    most = method.candidates(
        (key, task.rank, task.place.a_tail[0]) for key, task in zip(keys, tasks, strict=True)
    )
    errors = Problems()
    result = []
    for key, task in zip(keys, tasks, strict=True):
        specs, count = dict(task.statistics), most[key]
        errors += _problems(method, specs["components"], specs["variances"], count, task)
        own: dict[str, Any] = {field.name: getattr(task, field.name) for field in fields(task)}
        result.append(CandidateFactors(**own, candidates=count))
    errors.raise_all()
    return result


def _problems(
    method: RedistributingInit,
    components: TensorSpec,
    variances: TensorSpec,
    count: int,
    task: InitialFactors,
) -> list[AdapterkitError]:
    stored, problems = components.shape[0], Problems()
    if variances.shape != (stored,):
        problems.append(
            Damaged(
                f"{variances.key} has shape {variances.shape} for {stored} components",
                expected="one variance for each component",
                where=components.file,
                hint="collect them on this model",
            )
        )
    if stored < count:
        where = components.file
        problems.append(method.too_few(task.name, task.rank, stored, count, where))
    return problems


def finalize_by_ratios(tasks: Sequence[Task]) -> Finalize:
    """Give each module its rank once the ratios of all are known."""
    return partial(_redistribute, [cast(CandidateFactors, task) for task in tasks])


def _redistribute(tasks: Sequence[CandidateFactors], metrics: list[dict[str, Any]]) -> list[Change]:
    budget = sum(task.rank for task in tasks)
    ranks = distribute([metric["ratios"] for metric in metrics], budget)
    return [partial(_cut, task, rank) for task, rank in zip(tasks, ranks, strict=True)]


def _cut(task: CandidateFactors, rank: int, result: TaskResult) -> TaskResult:
    """The first `rank` components; nothing for a module without a rank."""
    if not rank:
        return TaskResult({}, {DROPPED: True})
    a, b = (cast(Tensor, result.tensors[key]) for key in (task.place.a_key, task.place.b_key))
    ratios = result.metrics["ratios"]
    metrics = {
        "rank": rank,
        "alpha": task.method.new_alpha(task.alpha, task.rank, rank),
        "explained": short(sum(ratios[:rank])),
    }
    tensors = {task.place.a_key: a[:rank].contiguous(), task.place.b_key: b[:, :rank].contiguous()}
    return TaskResult(tensors, metrics)


def warn_of_dropped(metrics: dict[str, dict]) -> list[str]:
    """What the receipt says of modules without a rank."""
    dropped = [name for name, metric in metrics.items() if metric.get(DROPPED)]
    if not dropped:
        return []
    return [f"no factors for {listed(dropped)}: other modules' components explain more"]

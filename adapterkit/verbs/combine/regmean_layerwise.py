"""combine --data: regmean with the inputs that the combined model's layers see, layer after
layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

from adapterkit.core.checkpoint.hub_ids import is_on_hub
from adapterkit.core.checkpoint.reader import Sources
from adapterkit.core.engine.reader import LocalReader
from adapterkit.core.errors import Failed, Problems, Refused, listed, shown, unrecoverable
from adapterkit.core.inputs.base_door import read_checkpoint
from adapterkit.core.inputs.sources import open_model
from adapterkit.core.lazy import Tensor, torch
from adapterkit.core.options import Progress
from adapterkit.core.output.stage import WORK, Workspace, work_folder
from adapterkit.core.plan import Effort, OutputFile, Plan, TaskResult
from adapterkit.core.weights.layers import is_linear
from adapterkit.core.weights.reader import Reader
from adapterkit.verbs.combine.planning.combine import plan_combine
from adapterkit.verbs.combine.records.combine import Combine
from adapterkit.verbs.combine.tasks.combine import CombinedFactors
from adapterkit.verbs.stats.data.records import draw_records
from adapterkit.verbs.stats.data.samples import Samples
from adapterkit.verbs.stats.job import Batch, CollectionPlan, SumsWatch
from adapterkit.verbs.stats.model.activations import ActivationStore
from adapterkit.verbs.stats.model.layers import OffloadedLayer, is_within
from adapterkit.verbs.stats.model.layerwise import run_layerwise
from adapterkit.verbs.stats.model.layerwise_schedule import Pass, PassReader
from adapterkit.verbs.stats.model.stored_model import StoredModel
from adapterkit.verbs.stats.plan import (
    SUMS,
    ByOneProcess,
    ModelRun,
    Share,
    check_unchanged,
    reads_of,
    samples_of,
    sizes_of,
)
from adapterkit.verbs.stats.sums import Sum
from adapterkit.verbs.stats.sums_files import Collected, SumsFile
from adapterkit.verbs.stats.verb import StatsOptions

Pair = tuple[Tensor, Tensor]  # a (r, in), b (out, r)
HINT = "collect with adapterkit stats, and give --stats"


@dataclass(frozen=True)
class LayerwiseFactors(CombinedFactors):
    """Combined factors whose covariances are collected while the model runs; `made`: their
    results."""

    sums: tuple[Sum, ...] = field(default=(), compare=False, repr=False)
    made: TaskResult | None = field(default=None, compare=False, repr=False)

    @property
    def memory(self) -> int:
        return super().memory + (4 * (len(self.operands) + 1) + 28) * self.shape[1] ** 2

    @property
    def effort(self) -> Effort:
        return super().effort + Effort(wide=self.shape[1] ** 3)

    def covariance(self, inputs: Reader, which: int) -> Tensor:
        return self.sums[which].covariance(device=inputs.device)

    def covariance_errors(self) -> AbstractContextManager[None]:
        return unrecoverable(
            f"the inputs of {shown(self.name)}",
            expected="a covariance E[x xᵀ]",
            where="--data",
            hint="give more samples, or run the model in float32 or bfloat16",
            code="AK901",
        )

    def compute(self, inputs: Reader) -> TaskResult:
        return super().compute(inputs) if self.made is None else self.made


@dataclass(frozen=True)
class LayerwiseCollection(ByOneProcess, ModelRun):
    """The collection of `combine --data`: see `plan.Collecting`. A layer needs all samples before
    the next one."""

    batches: list[tuple[int, Batch]]  # the adapter's number, and a batch of its samples
    samples: list[Samples]
    widths: list[int]  # of the modules' inputs

    @property
    def work(self) -> int:
        return int(len(self.samples) * SUMS * sum(width**2 for width in self.widths))

    @property
    def effort(self) -> Effort:
        """The effort for two passes through each layer, and the sums."""
        tokens = sum(one.tokens for one in self.samples)
        squares = sum(width**2 for width in self.widths)
        return Effort(flops=tokens * (4 * self.parameters + 9 / 8 * squares))

    def totals(self, budget: int) -> dict[str, int]:
        return self.totals_of(self.samples, len(self.batches), budget)

    def collected(
        self,
        plan: Plan,
        file: OutputFile,
        stage: Workspace,
        device: torch.device,
        progress: Progress,
    ) -> OutputFile:
        """The file, with factors that are made while the model runs."""
        work = work_folder(stage)
        tasks = {task.name: task for task in file.tasks if isinstance(task, LayerwiseFactors)}
        with Sources(plan.folders, plan.identities) as sources:
            stored = StoredModel(self.base, sources, device)
            job = job_of(stored, self.options, self.batches, list(tasks))
            reader = _LayerwiseCombiner(job, tasks, LocalReader(sources, device), stage)
            name = f"activations.{stage.attempt}.part" if stage.attempt else "activations"
            with closing(ActivationStore(work, plan.budget, name)) as store, reader.adding():
                share = Share(progress, file.layout.size)
                run_layerwise(job, reader.watching, store, share, reader.rehearsal)
        check_unchanged(plan)
        missing = [name for name in tasks if name not in reader.made]
        if missing:
            raise Failed(
                f"{listed(missing)} saw no token that counts",
                expected="layers that the model runs",
                where="--data",
                hint="give other samples",
                code="AK901",
            )
        made = [
            replace(task, made=reader.made[task.name])
            if isinstance(task, LayerwiseFactors)
            else task
            for task in file.tasks
        ]
        return replace(file, tasks=tuple(made), collection=None)


def job_of(
    stored: StoredModel,
    options: StatsOptions,
    batches: Sequence[tuple[int, Batch]],
    names: list[str],
) -> CollectionPlan:
    """The collection for these modules; `Refused` with those that are no linear layers in a list of
    layers."""
    job = CollectionPlan(stored, options, [batch for _, batch in batches])
    job.runs, job.targets = list(batches), names
    errors = Problems(where=stored.base.name, code="AK901")
    if job.runs_whole_model:
        errors.add("no list of layers in the model", "layers, which run one after the other", HINT)
    modules = dict(stored.model.named_modules())
    wrong = [n for n in names if n not in modules or not is_linear(modules[n])]
    outside = [n for n in names if n not in wrong and job.units.unit_of(n) is None]
    if wrong:
        errors.add(f"factors of {listed(wrong)}", "linear layers of the model", HINT)
    if outside and not job.runs_whole_model:
        errors.add(f"{listed(outside)} outside of the list of layers", "layers in it", HINT)
    errors.raise_all()
    return job


class _LayerwiseCombiner(PassReader):
    """Run each layer with each adapter's own factors, combine them, and continue with the
    result."""

    watch: SumsWatch  # of the model, from when it runs

    def __init__(
        self,
        job: CollectionPlan,
        tasks: dict[str, LayerwiseFactors],
        inputs: LocalReader,
        stage: Workspace,
    ):
        self.job, self.tasks, self.inputs = job, tasks, inputs
        self.work, self.attempt = stage.path.parent / WORK, stage.attempt
        self.made: dict[str, TaskResult] = {}
        self.merged: dict[str, Pair] = {}
        self.own: list[dict[str, Pair]] = []  # of each adapter in a layer that is rehearsed
        self.active: dict[str, Pair] = {}  # the active factors
        self.collected: list[Collected] = []

    def watching(self, watch: SumsWatch) -> _LayerwiseCombiner:
        self.watch = watch
        return self

    @contextmanager
    def adding(self) -> Iterator[None]:
        """Add the active factors to the layers' outputs, inside the context."""

        def hook(name: str, module: Any, args: tuple, output: Tensor) -> Tensor | None:
            if name not in self.active:
                return None
            a, b = (part.to(output.device) for part in self.active[name])
            return output + torch.nn.functional.linear(
                torch.nn.functional.linear(args[0].to(a.dtype), a), b
            ).to(output.dtype)

        modules = ((name, self.job.model.get_submodule(name)) for name in self.tasks)
        handles = [module.register_forward_hook(partial(hook, name)) for name, module in modules]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def rehearsal(self, unit: OffloadedLayer) -> Iterator[bool]:
        tasks = [task for name, task in self.tasks.items() if is_within(name, [unit.name])]
        if not tasks:
            yield False
            return
        if any(task.name in self.made for task in tasks):
            raise Refused(
                f"the model runs {shown(unit.name)} more than once",
                expected="layers that run once",
                where=self.job.stored.base.name,
                hint=HINT,
                code="AK901",
            )
        numbers = range(max(number for number, _ in self.job.runs) + 1)
        paths = [self.work / f"{n}.{unit.order:06}.sums.safetensors" for n in numbers]
        self.collected = [Collected(self.job.sums()) for _ in numbers]
        is_done = all(path.exists() for path in paths)
        if not is_done:
            self.own = [self._own(tasks, number) for number in numbers]
        yield not is_done
        self.own = []
        for collected, path in zip(self.collected, paths, strict=True):
            if is_done:
                file = SumsFile.read(path)
                collected.sums.merge(map(file.sum, range(len(file.records))))
            else:
                collected.check()
                SumsFile.write(path, collected.sums.groups, {}, attempt=self.attempt)
        for task in tasks:
            self._combine(task)

    def _own(self, tasks: Sequence[LayerwiseFactors], number: int) -> dict[str, Pair]:
        """An adapter's factors in these modules, in float32."""
        pairs = {}
        for task in tasks:
            for operand in task.operands:
                if operand.number == number:
                    ((left, right),) = operand.factors.products(self.inputs)
                    pairs[task.name] = right.float(), left.float()
        return pairs

    def _combine(self, task: LayerwiseFactors) -> None:
        seen = [
            self.collected[operand.number].sums.by_module.get(task.name)
            for operand in task.operands
        ]
        sums = tuple(one for one in seen if one is not None and one.vectors)
        if len(sums) == len(task.operands):
            result = replace(task, sums=sums).compute(self.inputs)
            self.made[task.name] = result
            a, b = task.place.pair(result.tensors)
            self.merged[task.name] = a.float(), b.float()

    def begin(self, one: Pass, unit: OffloadedLayer | None, is_backward: bool) -> None:
        self.watch.masks = one.masks
        is_rehearsed = bool(self.own) and unit is not None
        self.active = self.own[one.block] if is_rehearsed else self.merged
        self.watch.sums = self.collected[one.block].sums if is_rehearsed else None

    def end(self, one: Pass, unit: OffloadedLayer | None, is_backward: bool) -> None:
        if self.watch.sums is not None:
            self.watch.sums.settle()

    def record_input(self, unit: OffloadedLayer, args: tuple, kwargs: dict[str, Any]) -> None:
        self.watch.record_input(unit.name, args, kwargs)


def plan_layerwise(options: Combine) -> Plan:
    """The plan of a combination with `data`; `Refused` with all problems."""
    data = list(options.data)
    errors = Problems(where="options", code="AK901")
    if options.method != "regmean":
        errors.add(f"--data with {options.method}", "regmean, which reads inputs", "remove --data")
    if is_on_hub(options.out):
        errors.add("--data with an output on the Hub", "a folder", "write one, and give --push")
    errors.raise_all()
    plan = plan_combine(options)
    shard, adapters = plan.shards[0], len(plan.decisions["adapters"])
    if adapters != len(data):
        errors.add(
            f"{len(data)} --data files for {adapters} adapters",
            "one for each adapter",
            "give --data FILE once per adapter, in their order",
        )
    wrong = [task.name for task in shard.tasks if not _can_run(task)]
    if wrong or len(plan.shards) > 1:
        several = "several models"
        problem = f"no standard factors of linear layers: {listed(wrong)}" if wrong else several
        errors.add(problem, "LoRAs of the linear layers of one model", HINT)
    errors.raise_all()
    tasks = [
        LayerwiseFactors(**{f.name: getattr(task, f.name) for f in fields(task)})
        for task in shard.tasks
        if isinstance(task, CombinedFactors)
    ]
    assert options.base is not None
    folder = open_model(options.base)
    base = read_checkpoint(folder, adapters)
    what = StatsOptions(samples=options.samples, length=options.length, seed=options.seed)
    drawn = [draw_records([path], what.samples, what.seed) for path in data]
    with Sources(plan.folders, {}) as sources:
        stored = StoredModel(base, sources, torch.device("cpu"), buffers=False)
        samples = samples_of(folder, stored.model, [one.records for one in drawn], what.length)
        batches: list[tuple[int, Batch]] = [
            (n, b) for n, one in enumerate(samples) for b in one.batches(what.batch)
        ]
        job = job_of(stored, what, batches, [task.name for task in tasks])
        sizes = sizes_of(job, {task.name: task.shape for task in tasks})
        collection = LayerwiseCollection(
            base=base,
            options=what,
            batches=batches,
            samples=samples,
            sizes=replace(sizes, sums=len(data) * sizes.sums),
            widths=[task.shape[1] for task in tasks],
            reads=tuple(reads_of(job)),
        )
        notes = [*(n for one in (*drawn, *samples) for n in one.notes), *job.notes]
    declared = {"files": [one.files for one in drawn], "sha256": [one.digest for one in samples]}
    return replace(
        plan,
        options=plan.options | {"data": declared},
        decisions=plan.decisions | {"data": declared},
        notes=tuple(dict.fromkeys([*plan.notes, *notes])),
        shards=(replace(shard, tasks=tuple(tasks), collection=collection),),
    )


def _can_run(task: object) -> bool:
    """True if a task makes factors of a linear layer from the adapters' factors alone."""
    if not isinstance(task, CombinedFactors):
        return False
    return task.place.is_linear and not any(operand.dora for operand in task.operands)

"""Sum up a model's layers over batches of data, and make the file of statistics from the sums."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

from adapterkit.bases.hub.scratch import BoundedFolder, BoundedSources
from adapterkit.core.checkpoint.folder import Folder
from adapterkit.core.checkpoint.layout import TensorPlan
from adapterkit.core.checkpoint.reader import Sources
from adapterkit.core.checkpoint.spec import Checkpoint
from adapterkit.core.engine.device import holds
from adapterkit.core.lazy import torch
from adapterkit.core.plan import Effort, OutputFile, Task, TaskResult
from adapterkit.core.records import Json
from adapterkit.core.tasks.common import decomposition
from adapterkit.core.weights.reader import Reader
from adapterkit.verbs.shared.statistics_file import INPUTS, METADATA, key_of
from adapterkit.verbs.stats.data.masks import following
from adapterkit.verbs.stats.job import Batch, CollectionPlan
from adapterkit.verbs.stats.model.activations import ActivationStore
from adapterkit.verbs.stats.model.gradients import Gradients
from adapterkit.verbs.stats.model.layerwise import SumsReader, run_layerwise
from adapterkit.verbs.stats.model.stored_model import StoredModel
from adapterkit.verbs.stats.sums import Sums
from adapterkit.verbs.stats.sums_files import WHOLE, Ledger, SumsFile, Tally, groups_of, sums_files
from adapterkit.verbs.stats.verb import StatsOptions

Progress = Callable[[int, int], None]  # (steps done, of how many)


def collect(
    base: Checkpoint,
    batches: Sequence[Batch],
    options: StatsOptions,
    *,
    work: Path,
    memory: int,
    device: torch.device,
    blocks: Sequence[int] = (),
    attempt: str = "",
    progress: Progress,
) -> None:
    """Sum up the inputs of a checkpoint's layers, and their gradients, while its model runs on
    `batches`; the sums become files in `work`, and existing ones are not made again.

    `batches`: keyword arguments of the model's forward, each of samples (batch, ...). With `labels`
    (batch, tokens) only tokens whose label is not -100 count, with `attention_mask` only those that
    it includes. Memory holds one layer, one batch's activations, and waiting batches up to `memory`
    bytes; the rest is in `work`. `blocks`: only these, kept separate, for a process that is this
    `attempt`.

    The model is in eval mode (PEFT collects gradients in training mode, whose dropout makes them
    random), in its checkpoint's dtype, without a cache. Raises `Refused` for models and data that
    cannot be run like this; `Failed` for inputs that are not finite."""
    with open_sources(base.folder) as sources:
        job = CollectionPlan(StoredModel(base, sources, device), options, batches)
        if attempt:
            job.runs = [run for run in job.runs if run[0] in blocks]
        ledger = Ledger(job, work, attempt)
        name = f"activations.{attempt}.part" if attempt else "activations"
        with closing(ActivationStore(work, memory, name)) as store:
            if job.runs_whole_model:
                _run_whole(job, ledger, progress)
            else:
                reader = run_layerwise(job, partial(SumsReader, job, ledger), store, progress)
                if reader.outside is not None:
                    reader.outside.close()


def _run_whole(job: CollectionPlan, ledger: Ledger, progress: Progress) -> None:
    """Run the whole model, batch by batch, except blocks whose sums exist."""
    stored, model, tally = job.stored, job.model, Tally(ledger, WHOLE)
    todo = [(block, batch) for block, batch in job.runs if not tally.is_done(block)]
    names = stored.parameters()
    if todo:
        stored.load(names, stored.device)
    gradients = Gradients(model, dict.fromkeys(job.targets if job.gradients else (), False))
    try:
        with (
            stored.buffers_on_device(model),
            job.watch() as watch,
            gradients.watching(),
            torch.set_grad_enabled(job.gradients),
        ):
            for number, (block, batch) in enumerate(todo):
                collected = tally.of(block)
                assert collected is not None
                on_device = {key: value.to(stored.device) for key, value in batch.items()}
                watch.sums, watch.masks = collected.sums, job.masks(watch, on_device)
                with following(watch.masks):
                    output = model(**job.arguments(on_device))
                if watch.masks is not None:
                    watch.masks.finish()
                if job.gradients:
                    job.loss(output).backward()
                for module, value in gradients.taken():
                    collected.add_gradient(module, value)
                del output
                progress(number + 1, len(todo))
        tally.close()
    finally:
        stored.free(names)


def open_sources(folder: Folder) -> Sources:
    """The base's files; those of the Hub are downloaded one after another, on bounded disk."""
    return BoundedSources(folder) if isinstance(folder, BoundedFolder) else Sources((folder,), {})


@dataclass(frozen=True)
class InputStatistics(Task):
    """Statistics of inputs that some modules share, added up from sums in files of the work
    folder."""

    modules: tuple[str, ...]
    width: int
    options: StatsOptions
    sums: tuple[tuple[SumsFile, int], ...] = ()

    @property
    def max_outputs(self) -> tuple[TensorPlan, ...]:
        width, k = self.width, min(self.options.components, self.width)
        shapes = {
            "covariance": (width, width),
            "mean": (width,),
            "components": (k, width),
            "variances": (k,),
            "variance": (1,),
        }
        what = [name for name in INPUTS if name in self.options.what]
        kinds = [kind for name in what for kind in INPUTS[name]]
        return tuple(TensorPlan(key_of(self.name, kind), "F32", shapes[kind]) for kind in kinds)

    @property
    def effort(self) -> Effort:
        if "pca" not in self.options.what:
            return Effort()
        one = decomposition(self.width, self.width, self.options.components)
        return replace(one, flops=0, wide=one.flops)

    @property
    def memory(self) -> int:
        # two sums, a covariance in both precisions, its eigenvectors
        return self.width**2 * (2 * 5 + 12 + 24 * ("pca" in self.options.what))

    def compute(self, inputs: Reader) -> TaskResult:
        sums = Sums([name for name in INPUTS if name in self.options.what], self.options.components)
        (file, number), *others = self.sums
        total = file.sum(number)
        for file, number in others:
            file.sum(number).add_to(total)
        total.modules = dict.fromkeys(self.modules)
        if "pca" in self.options.what and holds(inputs.device, self.memory):
            total = total.to(inputs.device)  # much arithmetic, unlike a mean
        values = {key_of(self.name, kind): value for kind, value in sums.of(total).items()}
        shared = {"shared": list(self.modules[1:])} if self.modules[1:] else {}
        return TaskResult(values, {"vectors": total.vectors, **shared})


@dataclass(frozen=True)
class GradientMean(Task):
    """dLoss/dW (out, in) of a module, the mean over that number of batches."""

    shape: tuple[int, ...]
    batches: int
    sums: tuple[SumsFile, ...] = ()

    @property
    def max_outputs(self) -> tuple[TensorPlan, ...]:
        return (TensorPlan(key_of(self.name, "gradient"), "F32", self.shape),)

    @property
    def memory(self) -> int:
        return 2 * sum(stored.nbytes for stored in self.max_outputs)

    def compute(self, inputs: Reader) -> TaskResult:
        first, *others = self.sums
        total = first.gradient(self.name)
        for file in others:
            total += file.gradient(self.name)
        mean = {key_of(self.name, "gradient"): total.div_(self.batches)}
        return TaskResult(mean, {"batches": self.batches})


@dataclass(frozen=True)
class CollectedFile:
    """The file of statistics made from the sums in a work folder."""

    work: Path
    options: StatsOptions
    batches: int

    @cached_property
    def files(self) -> list[SumsFile]:
        return sums_files(self.work)

    @cached_property
    def tasks(self) -> list[InputStatistics | GradientMean]:
        """The tasks in model order; also sets `shared` and `modules`."""
        tasks: dict[str, list[InputStatistics | GradientMean]] = {}
        for modules, places in groups_of(self.files):
            records = [file.records[number] for file, number in places]
            if sum(record["vectors"] for record in records):
                task = InputStatistics(
                    modules[0], tuple(modules), records[0]["width"], self.options, tuple(places)
                )
                tasks.setdefault(_part_of(places[0][0]), []).append(task)
        gradients: dict[str, list[SumsFile]] = {}
        for file in self.files:
            for module in file.gradients:
                gradients.setdefault(module, []).append(file)
        for module, files in gradients.items():
            shape = files[0].gradients[module]
            task = GradientMean(module, shape, self.batches, tuple(files))
            tasks.setdefault(_part_of(files[0]), []).append(task)
        return [task for part in sorted(tasks) for task in tasks[part]]

    @property
    def shared(self) -> dict[str, str]:
        """Module -> the module under whose name its statistics of inputs are stored."""
        inputs = [task for task in self.tasks if isinstance(task, InputStatistics)]
        return {module: task.name for task in inputs for module in task.modules[1:]}

    @property
    def modules(self) -> set[str]:
        """Modules that have statistics of their inputs, or a gradient."""
        return {task.name for task in self.tasks}.union(self.shared)


def _part_of(file: SumsFile) -> str:
    return file.name.rpartition("@")[2]


def metadata_with(shared: dict[str, str], about: Json) -> dict[str, str]:
    """The metadata of the file's header."""
    return {"format": "pt", METADATA: json.dumps({"shared": shared, **about})}


def planned_file(
    name: str, shapes: dict[str, tuple[int, int]], options: StatsOptions, batches: int, about: Json
) -> OutputFile:
    """The file at its maximal size: layers with the same inputs may turn out to share
    statistics."""
    tasks: list[Task] = []
    for module, (rows, width) in shapes.items():
        if {*INPUTS}.intersection(options.what):
            tasks.append(InputStatistics(module, (module,), width, options))
        if "gradient" in options.what:
            tasks.append(GradientMean(module, (rows, width), batches))
    shared = dict.fromkeys(shapes, max(shapes, key=len))  # longer than it can be
    return OutputFile.computed(name, tasks, metadata_with(shared, about))

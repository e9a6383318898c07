"""Plan `stats` completely before any weight is read: samples, batches, modules, sizes."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from adapterkit.core.checkpoint.disk import storage_errors, sync_folder
from adapterkit.core.checkpoint.folder import Folder
from adapterkit.core.checkpoint.hub_ids import is_on_hub, place_on_hub
from adapterkit.core.checkpoint.reader import Sources, changed
from adapterkit.core.checkpoint.spec import Checkpoint, open_checkpoint
from adapterkit.core.errors import Failed, Refused, listed, shown
from adapterkit.core.inputs.input_identity import identities, plan_of
from adapterkit.core.inputs.sources import open_model
from adapterkit.core.lazy import Tensor, torch
from adapterkit.core.options import Progress, StrPath, files
from adapterkit.core.output.journal import ShardResult
from adapterkit.core.output.stage import WORK, Workspace
from adapterkit.core.output.writer import ShardFile
from adapterkit.core.plan import Effort, OutputFile, Plan
from adapterkit.core.records import Json
from adapterkit.verbs.stats.collect import CollectedFile, collect, metadata_with, planned_file
from adapterkit.verbs.stats.data.apart import tokenize_apart
from adapterkit.verbs.stats.data.records import Record, draw_records
from adapterkit.verbs.stats.data.samples import Samples, tokenize_all
from adapterkit.verbs.stats.job import BLOCKS, CollectionPlan, takes_rows, tokens_of
from adapterkit.verbs.stats.model.activations import TABLES
from adapterkit.verbs.stats.model.stored_model import StoredModel
from adapterkit.verbs.stats.verb import Stats, StatsOptions

# bytes of an element of a covariance in sums, of which 9/16 are kept: in float64; beside it those
# of a block, in float64 and in float32
SUMS, SUMMING = 8 * 9 / 16, (8 + 4) * 9 / 16
LENGTH = 512  # tokens of a sample, unless the model has fewer positions
SUFFIX, COLLECT = ".safetensors", "adapterkit.runtime.collect(model, run_model)"


@dataclass(frozen=True)
class Sizes:
    """Bytes that a dry run prints, and the number of layers."""

    layers: int
    model: int  # the stored tensors
    weights: int  # of the largest set of weights in memory
    computed: int  # of a batch's activations in it
    sums: int  # of a layer's, or of all
    activations: int
    device: int  # of weights that are on a GPU together, where there is one


@dataclass(frozen=True)
class ModelRun(ABC):
    """A collection that runs a model, and its needs of memory and disk."""

    base: Checkpoint
    options: StatsOptions
    sizes: Sizes
    reads: tuple[str, ...]  # files of the base, in the order in which they are read

    @property
    @abstractmethod
    def work(self) -> int:
        """Bytes of the sums on disk."""

    @property
    def parameters(self) -> int:
        return sum(math.prod(spec.shape) for spec in self.base.tensors.values())

    @property
    def device_memory(self) -> int:
        return self.sizes.device + self.sizes.computed + self.sizes.sums + TABLES

    def temporary_disk(self, budget: int) -> int:
        return self.work + max(0, self.sizes.activations - budget)

    def totals_of(self, samples: Sequence[Samples], batches: int, budget: int) -> dict[str, int]:
        """The entries of a dry run in addition to the file's sizes; `budget`: bytes of memory."""
        sizes = self.sizes
        in_memory = min(sizes.activations, budget)
        return {
            "samples": sum(len(one.samples) for one in samples),
            "tokens": sum(one.tokens for one in samples),
            "tokens_counted": sum(one.counted for one in samples),
            "batches": batches,
            "layers": sizes.layers,
            "memory_peak": sizes.weights + sizes.computed + sizes.sums + in_memory,
        }


class ByOneProcess:
    """A collection that the process that makes the file runs alone, for example because each layer
    needs all samples before the next one begins."""

    blocks = 1

    def collect_blocks(
        self,
        plan: Plan,
        files: Sequence[OutputFile],
        stage: Workspace,
        device: torch.device,
        finished: Callable[[ShardResult], None],
        progress: Progress,
    ) -> None:
        """Publish empty blocks."""
        for file in files:
            made = ShardFile(stage.path, file.name, 0, stage.attempt)
            made.publish()
            finished(ShardResult(file.name, 0, None, None, {}))


@dataclass(frozen=True)
class Collection(ModelRun):
    """A collection of `stats`: the model, samples, modules and sizes."""

    samples: Samples
    batches: list[dict[str, Tensor]]
    shapes: dict[str, tuple[int, int]]  # (out, in) of each module
    about: Json  # for the file's header

    @property
    def blocks(self) -> int:
        return min(BLOCKS, len(self.batches))

    @property
    def work(self) -> int:
        shapes = self.shapes.values()
        gradients = sum(
            4 * rows * width for rows, width in shapes if "gradient" in self.options.what
        )
        return gradients + int(SUMS * sum(width**2 for _, width in shapes if self.sizes.sums))

    @property
    def effort(self) -> Effort:
        """The effort for the model, its gradients and the sums, including those of layers with the
        same inputs."""
        passes = 4 if "gradient" in self.options.what else 1  # forward again, and two backward
        squares = sum(width**2 for _, width in self.shapes.values()) if self.sizes.sums else 0
        return Effort(flops=self.samples.tokens * (2 * passes * self.parameters + 9 / 8 * squares))

    def totals(self, budget: int) -> dict[str, int]:
        return self.totals_of([self.samples], len(self.batches), budget) | {
            "modules": len(self.shapes),
            "bytes_read": self.sizes.model,
        }

    def collect_blocks(
        self,
        plan: Plan,
        files: Sequence[OutputFile],
        stage: Workspace,
        device: torch.device,
        finished: Callable[[ShardResult], None],
        progress: Progress,
    ) -> None:
        """Compute these blocks, which go through the model together."""
        lists = [ShardFile(stage.path, file.name, 0, stage.attempt) for file in files]
        try:
            numbers = [file.range[0] for file in files if file.range is not None]
            self._collect(plan, stage, device, numbers, Share(progress, sum(f.size for f in files)))
            for number, file, made in zip(numbers, files, lists, strict=True):
                folder = stage.path.parent / WORK / str(number)
                with storage_errors(folder):
                    sync_folder(folder)
                data = json.dumps(sorted(path.name for path in folder.glob(f"*{SUFFIX}"))).encode()
                made.write(data, 0)
                made.sync()
                made.publish()
                finished(ShardResult(file.name, len(data), None, None, {}))
        except BaseException:
            for made in lists:
                made.abandon()
            raise

    def collected(
        self,
        plan: Plan,
        file: OutputFile,
        stage: Workspace,
        device: torch.device,
        progress: Progress,
    ) -> OutputFile:
        """The file made from the sums: those of all blocks of other processes, or those computed
        here first. `Failed` if no layer has any."""
        work = stage.path.parent / WORK
        share = Share(progress, file.layout.size)
        if not stage.attempt:
            self._collect(plan, stage, device, (), share)
        share(1, 1)
        made = CollectedFile(work, self.options, len(self.batches))
        if not made.modules.intersection(self.shapes):
            raise Failed(
                f"none of {len(self.shapes)} layers saw a token that counts",
                expected="layers that the model runs",
                where="--targets",
                hint="give other --targets",
                code="AK902",
            )
        return OutputFile.computed(file.file, made.tasks, metadata_with(made.shared, self.about))

    def _collect(
        self,
        plan: Plan,
        stage: Workspace,
        device: torch.device,
        blocks: Sequence[int],
        progress: Callable[[int, int], None],
    ) -> None:
        collect(
            replace(self.base, folder=plan.folders[0]),
            self.batches,
            self.options,
            work=stage.path.parent / WORK,
            memory=plan.budget,
            device=device,
            blocks=blocks,
            attempt=stage.attempt,
            progress=progress,
        )
        check_unchanged(plan)


class Share:
    """Convert finished steps into their share of bytes."""

    def __init__(self, progress: Progress, size: int):
        self.progress, self.size, self.done = progress, size, 0

    def __call__(self, done: int, total: int) -> None:
        now = self.size * done // total
        self.progress(now - self.done)
        self.done = now


def check_unchanged(plan: Plan) -> None:
    """`Unrecoverable` if a file of the model has changed since the plan."""
    now = identities(plan.folders, plan.headers)
    for (_, name), before, after in ((key, plan.identities[key], now[key]) for key in now):
        if before != after:
            raise changed(name)


def plan_stats(stats: Stats) -> Plan:
    """The plan of the collection, or `Refused`."""
    on_hub = place_on_hub(stats.out) if is_on_hub(stats.out) else None
    name = PurePosixPath(on_hub.subfolder).name if on_hub else Path(stats.out).name
    suffix = Path(name).suffix
    if suffix != SUFFIX:
        raise Refused(
            f"a file of type {shown(suffix) or 'unknown'}",
            expected=f"a name with {SUFFIX}",
            where=str(stats.out),
            hint="choose another --out",
            code="AK601",
        )
    options, data = stats.only(StatsOptions), files(stats.data)
    return plan_statistics(open_model(stats.base), data, options, name)


def plan_statistics(
    folder: Folder, data: Sequence[StrPath], options: StatsOptions, name: str
) -> Plan:
    """The plan of a file of statistics with that name."""
    base = open_checkpoint(folder)
    drawn = draw_records(data, options.samples, options.seed)
    with Sources((folder,), {}) as sources:
        stored = StoredModel(base, sources, torch.device("cpu"), buffers=False)
        needs_loss = "--what" if "gradient" in options.what else ""
        (samples,) = samples_of(folder, stored.model, [drawn.records], options.length, needs_loss)
        batches = samples.batches(1 if takes_rows(options) else options.batch)
        job = CollectionPlan(stored, options, batches)
    shapes = {name: _shape(job, name) for name in job.targets}
    given = {key: value for key, value in vars(options).items() if value is not None}
    given["what"] = list(options.what)
    source = {"files": drawn.files, "sha256": samples.digest}
    about = {
        "tokens": sum(map(tokens_of, batches)),
        "samples": len(samples.samples),
        "what": given["what"],
        "model": type(stored.model).__name__,
        **({"compat": options.compat} if options.compat else {}),
        "options": given,
        "data": source,
    }
    collection = Collection(
        base=base,
        options=options,
        samples=samples,
        batches=batches,
        shapes=shapes,
        sizes=sizes_of(job, shapes),
        about=about,
        reads=tuple(reads_of(job)),
    )
    file = planned_file(name, shapes, options, len(batches), about)
    plan = plan_of(
        "stats",
        {**given, "data": source},
        [base],
        configs=(0,),
        shards=[replace(file, collection=collection)],
        files={},
        decisions={"data": source, "modules": len(shapes)},
        notes=dict.fromkeys([*drawn.notes, *samples.notes, *job.notes]),
        warn=partial(_unseen, list(shapes)),
    )
    return replace(plan, is_file=True)


def _unseen(modules: list[str], metrics: dict[str, dict]) -> list[str]:
    """A note on the modules without statistics."""
    seen = {
        name for owner, metric in metrics.items() for name in (owner, *metric.get("shared", ()))
    }
    unseen = [name for name in modules if name not in seen]
    return [f"no statistics of {listed(unseen)}: they saw no token that counts"] if unseen else []


def samples_of(
    folder: Folder,
    model: Any,
    records: Sequence[list[Record]],
    length: int | None,
    needs_loss: str = "",  # the cause that needs the model's loss
) -> list[Samples]:
    """The samples of a text model; `Refused` for another one, or if it has fewer positions."""
    name, config = type(model).__name__, model.config
    if model.main_input_name != "input_ids":
        raise Refused(
            f"{name} reads {shown(model.main_input_name)}, no text",
            expected="a model of texts",
            where=folder.label,
            hint="give another model"
            if needs_loss == "--data"
            else f"collect in Python: {COLLECT}",
            code="AK902",
        )
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        raise Refused(
            "the config has no decoder_start_token_id",
            expected="the token with which the decoder starts",
            where=f"{folder.label}/config.json",
            hint="add it to the config",
            code="AK902",
        )
    positions = positions_of(model)
    if length is not None and length > positions:
        raise Refused(
            f"--length {length} is too long",
            expected=f"at most {positions}, the positions of {name}",
            where="options",
            hint="give a smaller --length",
            code="AK902",
        )
    needs_tokenizer = any(record.kind != "tokens" for its in records for record in its)
    if needs_loss:
        _check_loss(model, needs_tokenizer, needs_loss)
    tokens: Json = {
        "length": min(length or LENGTH, positions),
        "vocabulary": model.get_input_embeddings().weight.shape[0],
        "pad": getattr(config.get_text_config(), "pad_token_id", None),
        "is_encoder_decoder": config.is_encoder_decoder,
    }
    if needs_tokenizer:
        return tokenize_apart(folder, records, tokens)
    return tokenize_all(records, None, tokens)


def _shape(job: CollectionPlan, module: str) -> tuple[int, int]:
    """(out, in) of a layer's weight."""
    rows, width = job.model.get_submodule(module).weight.shape
    return (width, rows) if job.is_transposed(module) else (rows, width)


def reads_of(job: CollectionPlan) -> list[str]:
    """The base's files in reading order, as far as known: a model's code may call its layers in
    another one."""
    units = job.units
    if job.runs_whole_model:
        return job.stored.reads([job.stored.parameters()])
    forward = [unit.parameters for unit in units.outer if unit is not job.head]
    backward = reversed(forward) if job.gradients else ()
    return job.stored.reads([units.outside, *forward, *backward])


def sizes_of(job: CollectionPlan, shapes: dict[str, tuple[int, int]]) -> Sizes:
    """The job's sizes, from its layers' shapes."""
    stored, units = job.stored, job.units
    layers = [unit for unit in units.outer if unit.is_layer]
    runs_whole_model = job.options.whole_model or not layers
    weights = device = stored.nbytes(stored.parameters())
    if not runs_whole_model:
        device = max(stored.nbytes(unit.parameters) for unit in units.outer)
        weights = stored.nbytes(units.outside) + device
    squares, widths = Counter[Any](), Counter[Any]()  # of a unit's modules together
    for name, (rows, width) in shapes.items():
        unit = None if runs_whole_model else units.unit_of(name)
        squares[unit] += width**2
        widths[unit] += rows + width
    needs_sums = {"covariance", "pca"}.intersection(job.inputs)
    # blocks take turns outside the layers
    outside = 0 if runs_whole_model else squares.pop(None, 0)
    sums = max(squares.values(), default=0) * (SUMS + SUMMING) + outside * (SUMS + BLOCKS * SUMMING)
    hidden = getattr(stored.model.config.get_text_config(), "hidden_size", 0)
    states = len(layers) + 1 if job.gradients else 1
    sizes = [batch["input_ids"].numel() for batch in job.batches]
    each = stored.dtype.itemsize
    return Sizes(
        layers=len(layers),
        model=sum(spec.nbytes for spec in stored.base.tensors.values()),
        weights=weights,
        computed=max(sizes) * max(widths.values()) * each,
        sums=int(sums) if needs_sums else 0,
        activations=sum(sizes) * hidden * each * states,
        device=device,
    )


def positions_of(model: Any) -> int:
    """The number of positions of a model; a large number if it has no such limit."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    # RoBERTa's first positions are those of padding
    first = [
        module.padding_idx + 1
        for name, module in model.named_modules()
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None
    ]
    return positions - max(first, default=0) if isinstance(positions, int) else 2**31 - 1


def _check_loss(model: Any, is_text: bool, where: str) -> None:
    """`Refused` for a model whose labels are no tokens, or tokens that it sees."""
    name, gradients = type(model).__name__, where == "--what"
    if model.get_output_embeddings() is None:
        raise Refused(
            f"{name} predicts no tokens, so it has no loss of them",
            expected="a model with a loss of its tokens, such as a causal LM",
            where=where,
            hint=f"collect them in Python: {COLLECT}" if gradients else "give another model",
            code="AK902",
        )
    if is_text and name.endswith("ForMaskedLM"):
        raise Refused(
            f"plain text has no masked tokens that {name} could predict",
            expected="input_ids with masked tokens, and labels",
            where="--data",
            hint="mask the tokens yourself" + ", or remove gradient from --what" * gradients,
            code="AK902",
        )

"""stats: statistics of what a model's layers see of some data, for what is initialized, quantized
or refitted by them."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapterkit.checkpoint.folder import Folder, LocalFolder
from adapterkit.checkpoint.reader import Identity, Sources
from adapterkit.checkpoint.spec import Checkpoint, open_checkpoint
from adapterkit.engines.execution import writes
from adapterkit.engines.local import pick_device
from adapterkit.errors import Failed, Refused, listed, shown
from adapterkit.options import StrPath, files, kinds, parse_size
from adapterkit.plan import Plan, Progress
from adapterkit.planning.input_files import header_hashes, identities
from adapterkit.planning.sources import open_model
from adapterkit.receipt import RECEIPT_VERSION, Receipt, public_recipe
from adapterkit.statistics import output
from adapterkit.statistics.collect import WHAT, Collection, Request, collect_statistics
from adapterkit.statistics.file import Results, write_statistics
from adapterkit.statistics.records import Record, draw_records
from adapterkit.statistics.samples import IGNORED, Samples, load_tokenizer, tokenize
from adapterkit.statistics.stored_model import StoredModel
from adapterkit.statistics.sums import COMPONENTS
from adapterkit.tasks.statistics import metadata_of

_SUM = 9  # bytes of an element of a covariance's sums: 9/16 of them, in float64 and in float32
LENGTH = 512  # tokens of a sample, unless the model has fewer positions


@dataclass(frozen=True)
class Options:
    """The options that decide what is in the file; fields have their names."""

    what: tuple[str, ...]
    samples: int
    length: int | None
    targets: str | None
    batch: int
    seed: int
    whole: bool
    compat: str | None


@dataclass(frozen=True)
class Sizes:
    """Bytes that a dry run prints, and the number of layers."""

    layers: int
    model: int  # the stored tensors
    weights: int  # of what is in memory together: the largest layer, or the model
    sums: int  # of a layer's, or of all
    activations: int


@dataclass(frozen=True)
class StatisticsPlan:
    """Everything `stats` will do: the model, the samples, the modules, sizes."""

    base: Checkpoint
    options: Options
    data: dict[str, Any]  # the files, and the hash of the samples
    samples: Samples
    batches: list[dict[str, Tensor]]
    shapes: dict[str, tuple[int, int]]  # (out, in) of each module
    sizes: Sizes
    device: torch.device
    headers: dict[tuple[int, str], str]
    identities: dict[tuple[int, str], Identity]
    notes: tuple[str, ...]
    shards: tuple[()] = ()  # of a checkpoint

    @property
    def decisions(self) -> dict[str, Any]:
        return {"data": self.data, "modules": len(self.shapes)}

    def recipe(self) -> dict[str, Any]:
        """What makes two jobs the same: version, options, inputs, samples."""
        options = {key: value for key, value in vars(self.options).items() if value is not None}
        job = Plan("stats", options, (self.base.folder,), self.headers, self.identities, (), {})
        return json.loads(json.dumps(job.recipe() | {"data": self.data}))  # as it is read again

    def totals(self) -> dict[str, int]:
        """Sizes that a dry run prints. Those of the file and the disk are the most that it can be:
        layers that see the same inputs share their statistics."""
        size = sum(_elements(self.options.what, *shape) for shape in self.shapes.values()) * 4
        return {
            "samples": len(self.samples.samples),
            "tokens": self.samples.tokens,
            "tokens_counted": self.samples.counted,
            "batches": len(self.batches),
            "layers": self.sizes.layers,
            "modules": len(self.shapes),
            "bytes_read": self.sizes.model,
            "bytes_written": size,
            "disk_needed": size,
            "memory_peak": self.sizes.weights + self.sizes.sums + self.sizes.activations,
        }


def _elements(what: Sequence[str], rows: int, width: int) -> int:
    """Elements of a module's statistics."""
    k = min(COMPONENTS, width)
    sizes = {
        "covariance": width * width,
        "mean": width,
        "pca": k * width + k + 1,
        "gradient": rows * width,
    }
    return sum(sizes[name] for name in what)


@writes(what=kinds(WHAT))
def stats(
    base: StrPath,
    *,
    data: StrPath | Sequence[StrPath],
    out: StrPath,
    what: str | Sequence[str] = ("covariance",),
    samples: int = 256,
    length: int | None = None,
    targets: str | None = None,
    batch: int = 8,
    seed: int = 0,
    whole: bool = False,
    compat: str | None = None,
    device: str = "auto",
    memory: str | int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress = lambda done: None,
) -> Receipt | StatisticsPlan:
    """Collect statistics of what a model's linear layers see of some texts, one layer of the model
    in memory at a time.

    `data`: files. `.txt`: paragraphs with blank lines between them, or else each line is a sample.
    `.jsonl`: each line is one, with `text`; or with `prompt` and `completion`, of which the
    completion's tokens count; or with `messages`, for the tokenizer's chat template, of which the
    assistant's count where the template marks them; or with `input_ids`, and `labels` which are
    -100 where a token does not count. `.parquet`, or a folder of `datasets`: each row is one, of
    these columns. `samples` of them are drawn by `seed`, without replacement; each is cut to
    `length` tokens (default: 512, or the model's positions), to which none is added but the
    tokenizer's own.

    `what`, texts or one with commas: covariance E[x xᵀ], mean E[x], pca (the leading principal
    components of the centered inputs, with their variances), gradient (dLoss/dW of the model's
    loss, the mean over the batches of `batch` samples). `targets`: `all-linear` (the default: all
    linear layers but the output), ends of modules' names with commas between, or a regex. `whole`:
    run the whole model in memory, to the same numbers within rounding. `compat="peft"`: the
    covariance as PEFT's CorDA computes it, of inputs divided by their largest. `memory`: bytes of
    activations in memory, beyond which they go to disk (default: a quarter of the machine's).

    `out` is one safetensors file that appears whole or not at all; its metadata say what the job
    was, and so does the receipt's `data`. `progress` is called with the layers just done. Raises
    `Refused` before anything is written; `Failed` for inputs that are not finite.
    """
    options = Options(tuple(what), samples, length, targets, batch, seed, whole, compat)
    path, folder = Path(out), open_model(base)
    output.check_output(path, folder)
    plan = plan_stats(folder, files("data", data), options, _device(device))
    job = _Job(plan, parse_size("memory", memory) if memory else None, progress)
    if dry_run:
        return job.plan
    return job.run(path, resume=resume, overwrite=overwrite)


def plan_stats(
    folder: Folder, data: Sequence[StrPath], options: Options, device: torch.device
) -> StatisticsPlan:
    """Everything the collection will do, or `Refused`."""
    base = open_checkpoint(folder)
    drawn = draw_records(data, options.samples, options.seed)
    with Sources((folder,), {}) as sources:
        stored = StoredModel(base, sources, device)
        _check_layers(stored)
        model = stored.model
        samples = _samples(folder, model, drawn.records, options)
        batches = samples.batches(options.batch)
        if not _predicts_tokens(model):
            batches = [_without_labels(batch, model) for batch in batches]
        request = Request(options.what, options.targets, options.compat, COMPONENTS)
        request.check()
        collection = Collection(stored, request, batches)
    shapes = {name: _shape(collection, name) for name in collection.targets}
    headers = header_hashes({0: base}, configs=(0,))
    return StatisticsPlan(
        base,
        options,
        {"files": drawn.files, "sha256": samples.digest},
        samples,
        batches,
        shapes,
        _sizes(stored, batches, shapes, options),
        device,
        headers,
        identities((folder,), headers),
        tuple(dict.fromkeys([*drawn.notes, *samples.notes, *collection.notes])),
    )


def _samples(folder: Folder, model: Any, records: list[Record], options: Options) -> Samples:
    """The samples of a model of texts; `Refused` for another, or where it has fewer positions."""
    name = type(model).__name__
    if model.main_input_name != "input_ids":
        raise Refused(
            f"{name} reads {shown(model.main_input_name)}, no text",
            expected="a model of texts",
            where=folder.label,
            hint="collect in Python: adapterkit.runtime.collect(model, run_model)",
        )
    config = model.config
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        raise Refused(
            "no decoder_start_token_id",
            expected="the token with which the decoder begins",
            where=f"{folder.label}/config.json",
            hint="add it to the config",
        )
    positions = _positions(model)
    if options.length is not None and options.length > positions:
        raise Refused(
            f"--length {options.length}",
            expected=f"at most {positions}, the positions of {name}",
            where="options",
            hint="give a smaller --length",
        )
    needs_tokenizer = any(record.kind != "tokens" for record in records)
    if needs_tokenizer and "gradient" in options.what and name.endswith("ForMaskedLM"):
        raise Refused(
            f"gradients of {name} on plain text",
            expected="input_ids with masked tokens, and labels",
            where="--data",
            hint="mask the tokens yourself, or leave gradient out of --what",
        )
    return tokenize(
        records,
        load_tokenizer(folder) if needs_tokenizer else None,
        min(options.length or LENGTH, positions),
        model.get_input_embeddings().weight.shape[0],
        pad=getattr(config.get_text_config(), "pad_token_id", None),
        is_encoder_decoder=config.is_encoder_decoder,
    )


def _shape(collection: Collection, module: str) -> tuple[int, int]:
    """(out, in) of a layer's weight."""
    rows, width = collection.model.get_submodule(module).weight.shape
    return (width, rows) if collection.is_transposed(module) else (rows, width)


def _sizes(
    stored: StoredModel,
    batches: Sequence[dict[str, Tensor]],
    shapes: dict[str, tuple[int, int]],
    options: Options,
) -> Sizes:
    """What the job takes, by its layers' shapes."""
    layers = _layers(stored.model)
    parts = [""] if options.whole or not layers else layers
    within = lambda name, part: not part or name.startswith(f"{part}.")
    sums = [
        sum(_SUM * width**2 for name, (_, width) in shapes.items() if within(name, part))
        for part in parts
    ]
    needs_sums = {"covariance", "pca"} & {*options.what}
    vectors = sum(batch["input_ids"].numel() for batch in batches)
    width = getattr(stored.model.config.get_text_config(), "hidden_size", 0)
    kept = len(layers) + 1 if "gradient" in options.what else 1
    others = [*parts, *(name for name, module in stored.model.named_modules() if _is_table(module))]
    return Sizes(
        len(layers),
        sum(spec.nbytes for spec in stored.base.tensors.values()),
        max(stored.nbytes(stored.parameters(part)) for part in others),
        max(sums) if needs_sums else 0,
        vectors * width * stored.dtype.itemsize * kept,
    )


def _layers(model: Any) -> list[str]:
    """The layers of a model: the members of its outermost lists of modules."""
    names: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and not any(map(name.startswith, names)):
            names += [f"{name}.{number}" for number in range(len(module))]
    return names


def _check_layers(stored: StoredModel) -> None:
    """`Refused` where parameters of layers are not stored."""
    prefixes = tuple(f"{name}." for name in _layers(stored.model))
    missing = [name for name in stored.absent("") if name.startswith(prefixes)]
    if missing:
        raise Refused(
            f"no {listed(missing)}",
            expected="every parameter of the model's layers",
            where=stored.base.name,
            hint="fix the number of layers in the config, or restore the file",
        )


def _is_table(module: Any) -> bool:
    return isinstance(module, torch.nn.Embedding)


def _positions(model: Any) -> int:
    """How many tokens a model can tell apart by their place; a large number where it has no such
    limit."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    # RoBERTa's first positions are those of padding
    first = [
        module.padding_idx + 1
        for name, module in model.named_modules()
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None
    ]
    return positions - max(first, default=0) if isinstance(positions, int) else 2**31 - 1


def _predicts_tokens(model: Any) -> bool:
    """Whether a model's labels are tokens."""
    return model.get_output_embeddings() is not None


def _without_labels(batch: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """A batch for a model that predicts no tokens; `Refused` where some tokens do not count."""
    mask = batch["attention_mask"].bool()
    if not torch.equal(batch["labels"] != IGNORED, mask):
        raise Refused(
            f"completions, or labels, for {type(model).__name__}, which predicts no tokens",
            expected="texts of which all tokens count",
            where="--data",
            hint="give the whole as text",
        )
    return {name: value for name, value in batch.items() if name != "labels"}


def _device(name: str) -> torch.device:
    """`auto` is a GPU where there is one: unlike a merge, a forward pass waits for arithmetic."""
    return pick_device("cuda" if name == "auto" and torch.cuda.is_available() else name)


@dataclass(frozen=True)
class _Job:
    """A plan that is carried out."""

    plan: StatisticsPlan
    memory: int | None
    progress: Progress

    def run(self, out: Path, *, resume: bool, overwrite: bool) -> Receipt:
        began, recipe = time.monotonic(), self.plan.recipe()
        needed = self.plan.totals()["disk_needed"]
        is_new = output.write(
            out, recipe, self._fill, needed=needed, resume=resume, overwrite=overwrite
        )
        stats = open_checkpoint(LocalFolder(out))
        metadata, size = metadata_of(stats), out.stat().st_size
        seconds = time.monotonic() - began
        data = {
            "adapterkit": RECEIPT_VERSION,
            **metadata,
            "files": {out.name: {"size": size, "sha256": None}},
            "totals": self.plan.totals() | {"tensors": len(stats.tensors), "bytes_written": size},
            "keys": {},
            "parameters": {},
            "timings": {"seconds": round(seconds, 3)},
        }
        return Receipt(out, data, finished_before=not is_new)

    def _fill(self, file: Path, work: Path, goes_on: bool) -> None:
        plan, options, recipe = self.plan, self.plan.options, self.plan.recipe()
        results = collect_statistics(
            plan.base,
            plan.batches,
            what=options.what,
            targets=options.targets,
            work=work,
            memory=self.memory,
            device=plan.device,
            whole=options.whole,
            compat=options.compat,
            resume=goes_on,
            progress=_Layers(self.progress),
        )
        notes = list(dict.fromkeys([*plan.notes, *results.notes, *_unseen(plan, results)]))
        settings = {
            "fingerprint": output.fingerprint(recipe),
            "recipe": public_recipe(recipe),
            "notes": notes,
        }
        write_statistics(file, replace(results, settings=results.settings | settings))


def _unseen(plan: StatisticsPlan, results: Results) -> list[str]:
    """A note on the modules without statistics; `Failed` where no module has any."""
    unseen = [name for name in plan.shapes if name not in {*results.modules}]
    if len(unseen) == len(plan.shapes):
        raise Failed(
            f"none of {len(unseen)} layers saw a token that counts",
            expected="layers that the model runs",
            where="--targets",
            hint="name other --targets",
        )
    return [f"no statistics of {listed(unseen)}: they saw no token that counts"] if unseen else []


class _Layers:
    """Turns steps done of so many into the steps just done."""

    def __init__(self, progress: Progress):
        self.progress, self.done = progress, None

    def __call__(self, done: int, total: int) -> None:
        if self.done is None:
            getattr(self.progress, "expect", lambda total: None)(total)
            self.done = 0
        self.progress(done - self.done)
        self.done = done

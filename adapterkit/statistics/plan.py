"""What `stats` will do, complete before any weight is read: samples, batches, modules, sizes."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adapterkit.checkpoint.folder import Folder
from adapterkit.checkpoint.reader import Identity, Sources
from adapterkit.checkpoint.spec import Checkpoint, open_checkpoint
from adapterkit.checkpoint.system import quarter_of_memory
from adapterkit.errors import Refused, listed, shown
from adapterkit.options import StrPath
from adapterkit.plan import Plan
from adapterkit.planning.input_files import header_hashes, identities
from adapterkit.statistics.job import Job, Request
from adapterkit.statistics.masks import IGNORED
from adapterkit.statistics.records import Record, draw_records
from adapterkit.statistics.samples import Samples, load_tokenizer, tokenize
from adapterkit.statistics.stored_model import StoredModel
from adapterkit.statistics.sums import COMPONENTS
from adapterkit.statistics.units import Units

# bytes of an element of a covariance in sums, of which 9/16 are kept: in float64; beside it while
# they are summed in float32
SUMS, SUMMING = 8 * 9 / 16, 4 * 9 / 16
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
    memory: int  # bytes of activations
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
        what, shapes = self.options.what, self.shapes.values()
        size = 4 * sum(_elements(what, *shape) for shape in shapes)
        work = sum(4 * rows * width for rows, width in shapes if "gradient" in what)
        if self.sizes.sums:
            work += int(SUMS * sum(width**2 for _, width in shapes))
        in_memory = min(self.sizes.activations, self.memory)
        return {
            "samples": len(self.samples.samples),
            "tokens": self.samples.tokens,
            "tokens_counted": self.samples.counted,
            "batches": len(self.batches),
            "layers": self.sizes.layers,
            "modules": len(self.shapes),
            "bytes_read": self.sizes.model,
            "bytes_written": size,
            "disk_needed": size + work + self.sizes.activations - in_memory,
            "memory_peak": self.sizes.weights + self.sizes.sums + in_memory,
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


def plan_statistics(
    folder: Folder,
    data: Sequence[StrPath],
    options: Options,
    device: torch.device,
    memory: int | None = None,
) -> StatisticsPlan:
    """Everything the collection will do, or `Refused`. `memory`: bytes of activations, None: a
    quarter of the machine's."""
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
        job = Job(stored, request, batches)
    shapes = {name: _shape(job, name) for name in job.targets}
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
        quarter_of_memory() if memory is None else memory,
        headers,
        identities((folder,), headers),
        tuple(dict.fromkeys([*drawn.notes, *samples.notes, *job.notes])),
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


def _shape(job: Job, module: str) -> tuple[int, int]:
    """(out, in) of a layer's weight."""
    rows, width = job.model.get_submodule(module).weight.shape
    return (width, rows) if job.is_transposed(module) else (rows, width)


def _sizes(
    stored: StoredModel,
    batches: Sequence[dict[str, Tensor]],
    shapes: dict[str, tuple[int, int]],
    options: Options,
) -> Sizes:
    """What the job takes, by its layers' shapes."""
    layers = _layers(stored)
    parts = [""] if options.whole or not layers else layers
    within = lambda name, part: not part or name.startswith(f"{part}.")
    sums = [
        sum(width**2 for name, (_, width) in shapes.items() if within(name, part)) for part in parts
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
        int(max(sums) * (SUMS + SUMMING)) if needs_sums else 0,
        vectors * width * stored.dtype.itemsize * kept,
    )


def _layers(stored: StoredModel) -> list[str]:
    """The layers of a model: the members of its outermost lists of modules."""
    return [unit.name for unit in Units.of(stored).outer if unit.is_layer]


def _check_layers(stored: StoredModel) -> None:
    """`Refused` where parameters of layers are not stored."""
    prefixes = tuple(f"{name}." for name in _layers(stored))
    missing = [name for name in stored.absent() if name.startswith(prefixes)]
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

"""What `stats` will do, complete before any weight is read: samples, batches, modules, sizes."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adapterkit.checkpoint.folder import Folder
from adapterkit.checkpoint.reader import Sources, changed
from adapterkit.checkpoint.spec import Checkpoint, open_checkpoint
from adapterkit.engines.device import pick_device
from adapterkit.errors import Refused, shown
from adapterkit.options import StrPath
from adapterkit.plan import Plan
from adapterkit.planning.inputs.input_identity import identities, plan_of
from adapterkit.statistics.data.records import Record, draw_records
from adapterkit.statistics.data.samples import Samples, load_tokenizer, tokenize
from adapterkit.statistics.job import CollectionJob, Request
from adapterkit.statistics.ledger import foreseen
from adapterkit.statistics.model.stored_model import StoredModel

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
    components: int

    @property
    def request(self) -> Request:
        return Request(self.what, self.targets, self.compat, self.components)


@dataclass(frozen=True)
class Sizes:
    """Bytes that a dry run prints, and the number of layers."""

    layers: int
    model: int  # the stored tensors
    weights: int  # of what is in memory together, with what a batch makes of it
    sums: int  # of a layer's, or of all
    activations: int


@dataclass(frozen=True)
class Collection:
    """What `stats` collects: of which model, of which samples and modules; sizes."""

    base: Checkpoint
    options: Options
    data: dict[str, Any]  # the files, and the hash of the samples
    samples: Samples
    batches: list[dict[str, Tensor]]
    shapes: dict[str, tuple[int, int]]  # (out, in) of each module
    sizes: Sizes
    reads: tuple[str, ...]  # files of the base, in the order in which they are read
    parts: tuple[str, ...]  # names of the files of sums that are foreseen

    @classmethod
    def of(cls, plan: Plan) -> "Collection":
        """That of a plan of statistics."""
        assert isinstance(plan.collection, cls)
        return plan.collection

    def totals(self, memory: int) -> dict[str, int]:
        """Sizes that a dry run prints, with so many bytes for activations. Those of the file and
        the disk are the most that it can be: layers that see the same inputs share their
        statistics."""
        what, shapes = self.options.what, self.shapes.values()
        size = 4 * sum(_elements(what, self.options.components, *shape) for shape in shapes)
        work = sum(4 * rows * width for rows, width in shapes if "gradient" in what)
        if self.sizes.sums:
            work += int(SUMS * sum(width**2 for _, width in shapes))
        in_memory = min(self.sizes.activations, memory)
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


def device_of(name: str) -> torch.device:
    """`auto` is a GPU where there is one: unlike a merge, a forward pass waits for arithmetic."""
    return pick_device("cuda" if name == "auto" and torch.cuda.is_available() else name)


def check_unchanged(plan: Plan) -> None:
    """`Unrecoverable` where a file of the model is not the one that was planned with."""
    now = identities(plan.folders, plan.headers)
    for (_, name), before, after in ((key, plan.identities[key], now[key]) for key in now):
        if before != after:
            raise changed(name)


def _elements(what: Sequence[str], components: int, rows: int, width: int) -> int:
    """Elements of a module's statistics."""
    k = min(components, width)
    sizes = {
        "covariance": width * width,
        "mean": width,
        "pca": k * width + k + 1,
        "gradient": rows * width,
    }
    return sum(sizes[name] for name in what)


def plan_statistics(folder: Folder, data: Sequence[StrPath], options: Options) -> Plan:
    """Everything the collection will do, or `Refused`."""
    base = open_checkpoint(folder)
    drawn = draw_records(data, options.samples, options.seed)
    with Sources((folder,), {}) as sources:
        stored = StoredModel(base, sources, torch.device("cpu"), buffers=False)
        samples = _samples(folder, stored.model, drawn.records, options)
        options.request.check()
        batches = samples.batches(1 if options.request.takes_rows else options.batch)
        job = CollectionJob(stored, options.request, batches, options.whole)
    shapes = {name: _shape(job, name) for name in job.targets}
    collection = Collection(
        base=base,
        options=options,
        data={"files": drawn.files, "sha256": samples.digest},
        samples=samples,
        batches=batches,
        shapes=shapes,
        sizes=_sizes(job, shapes, options),
        reads=tuple(_reads(job, options)),
        parts=foreseen(job),
    )
    return plan_of(
        "stats",
        {key: value for key, value in vars(options).items() if value is not None},
        [base],
        configs=(0,),
        shards=(),
        files={},
        decisions={"data": collection.data, "modules": len(shapes)},
        notes=dict.fromkeys([*drawn.notes, *samples.notes, *job.notes]),
        collection=collection,
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
            "the config has no decoder_start_token_id",
            expected="the token with which the decoder begins",
            where=f"{folder.label}/config.json",
            hint="add it to the config",
        )
    positions = _positions(model)
    if options.length is not None and options.length > positions:
        raise Refused(
            f"--length {options.length} is too long",
            expected=f"at most {positions}, the positions of {name}",
            where="options",
            hint="give a smaller --length",
        )
    needs_tokenizer = any(record.kind != "tokens" for record in records)
    if "gradient" in options.what:
        _check_loss(model, needs_tokenizer)
    return tokenize(
        records,
        load_tokenizer(folder) if needs_tokenizer else None,
        min(options.length or LENGTH, positions),
        model.get_input_embeddings().weight.shape[0],
        pad=getattr(config.get_text_config(), "pad_token_id", None),
        is_encoder_decoder=config.is_encoder_decoder,
    )


def _shape(job: CollectionJob, module: str) -> tuple[int, int]:
    """(out, in) of a layer's weight."""
    rows, width = job.model.get_submodule(module).weight.shape
    return (width, rows) if job.is_transposed(module) else (rows, width)


def _reads(job: CollectionJob, options: Options) -> list[str]:
    """The files of the base in the order in which they are read, as far as it is known: a model's
    code may call its layers in another one."""
    units = job.units
    if options.whole or not units.has_layers:
        return job.stored.reads([job.stored.parameters()])
    forward = [unit.parameters for unit in units.outer if unit is not job.head]
    backward = reversed(forward) if job.gradients else ()
    return job.stored.reads([units.outside, *forward, *backward])


def _sizes(job: CollectionJob, shapes: dict[str, tuple[int, int]], options: Options) -> Sizes:
    """What the job takes, by its layers' shapes."""
    stored, units = job.stored, job.units
    layers = [unit for unit in units.outer if unit.is_layer]
    is_whole = options.whole or not layers
    weights = stored.nbytes(stored.parameters())
    if not is_whole:
        weights = stored.nbytes(units.outside)
        weights += max(stored.nbytes(unit.parameters) for unit in units.outer)
    squares, widths = Counter[Any](), Counter[Any]()  # of a unit's modules together
    for name, (rows, width) in shapes.items():
        unit = None if is_whole else units.unit_of(name)
        squares[unit] += width**2
        widths[unit] += rows + width
    needs_sums = {"covariance", "pca"} & {*options.what}
    hidden = getattr(stored.model.config.get_text_config(), "hidden_size", 0)
    states = len(layers) + 1 if "gradient" in options.what else 1
    sizes = [batch["input_ids"].numel() for batch in job.batches]
    return Sizes(
        len(layers),
        sum(spec.nbytes for spec in stored.base.tensors.values()),
        weights + max(sizes) * max(widths.values()) * stored.dtype.itemsize,
        int(max(squares.values()) * (SUMS + SUMMING)) if needs_sums else 0,
        sum(sizes) * hidden * stored.dtype.itemsize * states,
    )


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


def _check_loss(model: Any, is_text: bool) -> None:
    """`Refused` where labels are no tokens, or tokens that the model sees."""
    name = type(model).__name__
    if model.get_output_embeddings() is None:
        raise Refused(
            f"{name} predicts no tokens, so it has no gradients of their loss",
            expected="a model with a loss of its tokens, such as a causal LM",
            where="--what",
            hint="collect them in Python: adapterkit.runtime.collect(model, run_model)",
        )
    if is_text and name.endswith("ForMaskedLM"):
        raise Refused(
            f"plain text gives no gradients of {name}",
            expected="input_ids with masked tokens, and labels",
            where="--data",
            hint="mask the tokens yourself, or remove gradient from --what",
        )

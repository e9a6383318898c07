"""Statistics of a checkpoint's layers from batches of data."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapterkit.adapters.targets import ALL_LINEAR
from adapterkit.checkpoint.reader import Sources
from adapterkit.checkpoint.spec import Checkpoint
from adapterkit.errors import Refused, did_you_mean, refuse_all, shown
from adapterkit.planning.new_adapter import select_targets, wrappable
from adapterkit.planning.quantization import is_linear
from adapterkit.statistics.file import Results
from adapterkit.statistics.gradients import Gradients
from adapterkit.statistics.masks import Masks, token_masks
from adapterkit.statistics.stored_model import StoredModel
from adapterkit.statistics.sums import COMPONENTS, INPUTS, Sums
from adapterkit.statistics.watch import Watch
from adapterkit.statistics.work import SumsFile
from adapterkit.weights.names import TRANSPOSED

WHAT = (*INPUTS, "gradient")
COMPATS = ("peft",)
Batch = Mapping[str, Tensor]
Progress = Callable[[int, int], None]  # (steps done, of how many)


@dataclass(frozen=True)
class Request:
    """What is collected."""

    what: tuple[str, ...]
    targets: str | None
    compat: str | None
    components: int

    def check(self) -> None:
        """`Refused` for what cannot be collected, or not together."""
        errors: list[Any] = []
        for name in self.what:
            if name not in WHAT:
                errors.append(
                    Refused(
                        f"{shown(name)!r} as a kind of statistics",
                        expected=", ".join(WHAT),
                        where="what",
                        hint=did_you_mean([name], WHAT),
                    )
                )
        if not self.what:
            errors.append(Refused("nothing to collect", expected=", ".join(WHAT), where="what"))
        if self.compat is not None and self.compat not in COMPATS:
            errors.append(
                Refused(f"compat {shown(self.compat)!r}", expected="peft", where="compat")
            )
        if self.compat and "pca" in self.what:
            errors.append(
                Refused(
                    "pca with compat peft, whose covariance is of scaled inputs",
                    expected="one of them",
                    where="compat",
                    hint="leave compat out",
                )
            )
        if self.components < 1:
            errors.append(Refused(f"components {self.components}", expected="1 or more"))
        refuse_all(errors)


def collect_statistics(
    base: Checkpoint,
    batches: Sequence[Batch],
    *,
    what: Sequence[str] = ("covariance",),
    targets: str | None = None,
    work: Path,
    memory: int | None = None,
    device: str | torch.device = "cpu",
    whole: bool = False,
    compat: str | None = None,
    components: int = COMPONENTS,
    resume: bool = False,
    progress: Progress = lambda done, total: None,
) -> Results:
    """Statistics of the linear layers of a checkpoint's model while it runs on `batches`.

    `batches`: keyword arguments of the model's forward, each of samples (batch, ...); with
    `labels` (batch, tokens) only tokens whose label is not -100 count, with `attention_mask` only
    those that it lets count. `what`: covariance, mean, pca (the leading `components` principal
    components, centered, exact), gradient (of the model's loss, which needs `labels`; dLoss/dW,
    the mean over the batches). `targets`: as `init --targets`, all linear layers but the output
    if it is None. `work`: a folder for what has to wait, created; see `Results` for its end.
    `compat="peft"`: the covariance of PEFT's `preprocess_corda`, the mean over the calls of a layer
    of x xᵀ / max(x)², summed over all vectors of the call.

    The model is in eval mode (PEFT collects gradients in training mode, whose dropout makes them
    random), in its checkpoint's dtype, without a cache. Sums as `statistics.sums` says.

    Raises `Refused` before anything runs for models that transformers cannot build, targets that
    are no linear layers, batches that the gradient cannot be computed of; `Failed` for inputs
    that are not finite.
    """
    request = Request(tuple(dict.fromkeys(what)), targets, compat, components)
    request.check()
    with Sources((base.folder,), {}) as sources:
        stored = StoredModel(base, sources, torch.device(device))
        collection = Collection(stored, request, batches)
        work.mkdir(parents=True, exist_ok=True)
        files = run_whole(collection, work, progress)
    return collection.results(work, files)


class Collection:
    """A model, its layers whose statistics are collected, and the data."""

    def __init__(self, stored: StoredModel, request: Request, batches: Sequence[Batch]):
        self.stored, self.request, self.batches = stored, request, batches
        self.model, self.notes = stored.model, stored.notes
        names = [n for n, module in self.model.named_modules() if is_linear(module)]
        usable = wrappable(stored.names, names, self.notes)
        lacking = "passed by in PEFT, or its weight is read by the code around it"
        targets = request.targets or ALL_LINEAR
        self.targets, notes = select_targets(targets, usable, self.model, lacking)
        self.notes += notes
        self.gradients = "gradient" in request.what
        self.inputs = tuple(name for name in request.what if name in INPUTS)
        if not batches:
            raise Refused("no data", expected="one batch or more", where="data")
        if self.gradients:
            self._check_labels()

    def _check_labels(self) -> None:
        """`Refused` if some batch has no loss."""
        without = sum("labels" not in batch for batch in self.batches)
        if without:
            raise Refused(
                f"gradients of batches without labels: {without} of {len(self.batches)}",
                expected="labels, from which the model computes its loss",
                where="data",
                hint="leave gradient out of --what",
            )

    def sums(self) -> Sums:
        return Sums(self.inputs, self.request.components, self.request.compat == "peft")

    def is_transposed(self, module: str) -> bool:
        """Whether a layer's weight is (in, out)."""
        return type(self.model.get_submodule(module)).__name__ == TRANSPOSED

    def watch(self) -> Watch:
        """Hooks on the layers; none where no statistics of inputs are asked for."""
        layers = {name: self.model.get_submodule(name) for name in self.targets if self.inputs}
        return Watch(self.model, layers)

    def masks(self, watch: Watch, batch: Batch) -> Masks | None:
        """Which tokens of a batch count; None: all, as for CorDA's own covariance."""
        return watch.masks_of(batch) if self.inputs and self.request.compat is None else None

    def loss(self, output: Any) -> Tensor:
        """The loss of a model's output."""
        loss = getattr(output, "loss", None)
        if not isinstance(loss, Tensor):
            raise Refused(
                f"{type(self.model).__name__} computes no loss",
                expected="a model that computes a loss from labels, such as a causal LM",
                where=self.stored.base.name,
                hint="leave gradient out of --what",
            )
        return loss

    def results(self, work: Path, files: Sequence[SumsFile]) -> Results:
        settings = {"model": type(self.model).__name__}
        if self.request.compat:
            settings["compat"] = self.request.compat
        return Results(
            work, tuple(files), self.request.what, self.request.components,
            sum(map(_tokens, self.batches)), sum(map(_samples, self.batches)), settings,
            tuple(self.notes),
        )  # fmt: skip


def _tokens(batch: Batch) -> int:
    """How many tokens of a batch count, the decoder's not included; of images, how many there
    are."""
    mask = token_masks(batch)[0]
    if mask is not None:
        return int(mask.sum())
    ids = batch.get("input_ids")
    return int(ids.numel()) if ids is not None else _samples(batch)


def _samples(batch: Batch) -> int:
    return len(next(iter(batch.values())))


def run_whole(collection: Collection, work: Path, progress: Progress) -> list[SumsFile]:
    """The whole model in memory, batch by batch."""
    stored, model, sums = collection.stored, collection.model, collection.sums()
    names = stored.parameters()
    present = [name for name in names if name not in stored.absent("")]
    transposed = {module: collection.is_transposed(module) for module in collection.targets}
    stored.load(present)
    gradients = Gradients(model, transposed if collection.gradients else {})
    try:
        with (
            collection.watch() as watch,
            gradients.watching(),
            torch.set_grad_enabled(collection.gradients),
        ):
            watch.sums = sums
            for number, batch in enumerate(collection.batches):
                watch.masks = collection.masks(watch, batch)
                output = model(**{key: value.to(stored.device) for key, value in batch.items()})
                if collection.gradients:
                    collection.loss(output).backward()
                progress(number + 1, len(collection.batches))
        sums.settle()
        return [SumsFile.write(work, "whole.safetensors", sums.groups, dict(gradients.means()))]
    finally:
        stored.free(names)

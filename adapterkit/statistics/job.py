"""What is collected of which model from which data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from adapterkit.adapters.targets import ALL_LINEAR
from adapterkit.errors import Problems, Refused, did_you_mean, listed, shown
from adapterkit.planning.targets.stored_targets import EXPERTS, select_layers
from adapterkit.statistics.data.masks import Masks, token_masks
from adapterkit.statistics.file import Results
from adapterkit.statistics.model.hooks import SumsWatch
from adapterkit.statistics.model.layers import Unit, Units
from adapterkit.statistics.model.stored_model import StoredModel
from adapterkit.statistics.sums import Sums
from adapterkit.statistics.sums_files import SumsFile
from adapterkit.tasks.statistics import INPUTS
from adapterkit.weights.linear import is_linear
from adapterkit.weights.names import TRANSPOSED

WHAT = (*INPUTS, "gradient")
COMPATS = ("peft",)
Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Request:
    """What is collected."""

    what: tuple[str, ...]
    targets: str | None
    compat: str | None
    components: int
    experts: bool = False

    @property
    def takes_rows(self) -> bool:
        """Whether the model runs on one sample at a time: PEFT's covariance is a mean over them."""
        return self.compat == "peft" and "covariance" in self.what

    def check(self) -> None:
        """`Refused` for what cannot be collected, or not together."""
        errors = Problems()
        for name in self.what:
            if name not in WHAT:
                errors.add(
                    f"{shown(name)!r} is no kind of statistics",
                    ", ".join(WHAT),
                    did_you_mean([name], WHAT),
                    where="what",
                )
        if not self.what:
            errors.add("nothing to collect", ", ".join(WHAT), where="what")
        if self.compat is not None and self.compat not in COMPATS:
            errors.add(f"there is no compat {shown(self.compat)!r}", "peft", where="compat")
        if self.compat and "pca" in self.what:
            errors.add(
                "pca does not go with compat peft, whose covariance is of scaled inputs",
                "one of them",
                "remove --compat, or pca",
                where="compat",
            )
        if self.components < 1:
            errors.add(f"components is {self.components}", "1 or more")
        errors.raise_all()


class CollectionJob:
    """A model, its layers whose statistics are collected, and the data."""

    def __init__(
        self, stored: StoredModel, request: Request, batches: Sequence[Batch], whole: bool = False
    ):
        self.stored, self.request, self.batches = stored, request, batches
        self.model, self.notes = stored.model, stored.notes
        names = [n for n, module in self.model.named_modules() if is_linear(module)]
        targets, lacking = request.targets or ALL_LINEAR, "no linear layer"
        self.targets = select_layers(stored.names, targets, names, lacking, self.notes)
        self.gradients = "gradient" in request.what
        self.inputs = tuple(name for name in request.what if name in INPUTS)
        self.watched = [*self.targets, *(_experts(self.model) if request.experts else ())]
        self.units = Units.of(stored)
        if not batches:
            raise Refused("there are no data", expected="one batch or more", where="data")
        if self.gradients:
            self._check_labels()
        if request.takes_rows and any(_samples(batch) > 1 for batch in batches):
            raise Refused(
                "batches have several rows, with compat peft",
                expected="one row in each, as PEFT's preprocess_corda takes them",
                where="data",
                hint="remove --compat, or give the rows one by one",
            )
        self._check_parameters()
        self.is_whole = whole or not self.units.has_layers
        if self.is_whole and not whole:
            self.notes.append("no list of layers in the model: it was run whole")

    def _check_labels(self) -> None:
        """`Refused` if some batch has no loss."""
        without = sum("labels" not in batch for batch in self.batches)
        if without:
            raise Refused(
                f"{without} of {len(self.batches)} batches have no labels, which gradients need",
                expected="labels, from which the model computes its loss",
                where="data",
                hint="remove gradient from --what",
            )

    @property
    def head(self) -> Unit | None:
        """The output layer, if it is a unit that is not needed."""
        head = self.model.get_output_embeddings()
        units = [unit for unit in self.units.outer if unit.module is head]
        needed = self.gradients or (units and units[0].name in self.targets)
        return units[0] if units and not needed else None

    def _check_parameters(self) -> None:
        """`Refused` for parameters that are not stored and may be needed; those behind all layers
        become zero."""
        head = self.head
        absent = [
            name for name in self.stored.absent() if head is None or name not in head.parameters
        ]
        last = max((unit.order for unit in self.units.outer if unit.is_layer), default=0)
        order = {name: number for number, (name, _) in enumerate(self.model.named_modules())}
        in_layers = {n for unit in self.units.outer if unit.is_layer for n in unit.parameters}
        behind = [
            name
            for name in absent
            if order[name.rpartition(".")[0]] > last and name not in in_layers
        ]
        if len(behind) < len(absent) or (absent and self.gradients):
            raise Refused(
                f"the model has no {listed(absent)}",
                expected="every parameter that the model computes with",
                where=self.stored.base.name,
                hint="save the model with all of its parts",
            )
        if absent:
            self.notes.append(f"zero, because it is not stored: {listed(absent)}")

    def arguments(self, batch: Batch) -> dict[str, Any]:
        """Of the model's forward: without labels where no loss is asked for, unless the decoder's
        inputs are made of them."""
        decodes = getattr(self.model.config, "is_encoder_decoder", False)
        if self.gradients or decodes:
            return dict(batch)
        return {key: value for key, value in batch.items() if key != "labels"}

    def sums(self) -> Sums:
        return Sums(self.inputs, self.request.components, self.request.compat == "peft")

    def is_transposed(self, module: str) -> bool:
        """Whether a layer's weight is (in, out)."""
        return type(self.model.get_submodule(module)).__name__ == TRANSPOSED

    def watch(self) -> SumsWatch:
        """Hooks on the layers; none where no statistics of inputs are asked for."""
        layers = {name: self.model.get_submodule(name) for name in self.watched if self.inputs}
        return SumsWatch(self.model, layers)

    def masks(self, watch: SumsWatch, batch: Batch) -> Masks | None:
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
                hint="remove gradient from --what",
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


def _experts(model: nn.Module) -> list[str]:
    """Modules that hold stacks of experts' matrices."""
    return [
        name
        for name, module in model.named_modules()
        if any(value.dim() == 3 for value in module.parameters(recurse=False))
        and EXPERTS.search(f"{name} {type(module).__name__}")
    ]


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

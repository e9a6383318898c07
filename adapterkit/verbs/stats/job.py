"""Plan a collection: the model, its layers, the statistics, and the data."""

from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from adapterkit.core.adapter.targets import ALL_LINEAR
from adapterkit.core.errors import Refused, listed
from adapterkit.core.lazy import Tensor
from adapterkit.core.records import Json
from adapterkit.core.weights.layers import is_linear
from adapterkit.core.weights.names import TRANSPOSED
from adapterkit.verbs.shared.statistics_file import INPUTS
from adapterkit.verbs.shared.targets import CalledLayers, select_layers
from adapterkit.verbs.stats.data.masks import Leader, Masks, decoder_of, token_masks
from adapterkit.verbs.stats.model.coroutines import Coroutine
from adapterkit.verbs.stats.model.layers import OffloadedLayer, OffloadedLayers
from adapterkit.verbs.stats.model.stored_model import StoredModel
from adapterkit.verbs.stats.sums import Sums
from adapterkit.verbs.stats.verb import StatsOptions

if TYPE_CHECKING:
    from torch import nn

BLOCKS = 8  # at most: as many processes can share the work
Batch = Mapping[str, Tensor]


def takes_rows(options: StatsOptions) -> bool:
    """True if the model runs on one sample at a time, because PEFT's covariance is a mean over
    samples."""
    return options.compat == "peft" and "covariance" in options.what


class SumsWatch:
    """Add the inputs of layers to sums, inside the context.

    Set `masks` to those of the current batch; None: all vectors count. `stops`: modules whose
    forward runs elsewhere if a pass calls it; `record_input` adds their inputs."""

    def __init__(self, model: "nn.Module", modules: Mapping[str, "nn.Module"]):
        self.model, self.modules = model, modules
        self.sums: Sums | None = None  # nothing is added without
        self.masks: Masks | None = None
        self.stops: set[nn.Module] = set()
        self._leaders: dict[Hashable, Leader] = {}
        self._hooks: list[Any] = []

    def masks_of(self, batch: Mapping[str, Tensor]) -> Masks:
        """The masks of a batch."""
        masks = Masks(self.model, leaders=self._leaders)
        masks.enter(self.model, (), dict(batch))
        return masks

    def __enter__(self) -> "SumsWatch":
        for name, module in self.modules.items():
            hook = module.register_forward_pre_hook(self._see(name), with_kwargs=True)
            self._hooks.append(hook)
        decoder = decoder_of(self.model) if self.modules else None
        if decoder is not None:
            hook = decoder.register_forward_pre_hook(self._enter_decoder, with_kwargs=True)
            self._hooks.append(hook)
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _see(self, name: str) -> Any:
        def hook(module: "nn.Module", args: tuple, kwargs: dict[str, Any]) -> None:
            if module not in self.stops or Coroutine.current() is None:
                self.record_input(name, args, kwargs)

        return hook

    def record_input(self, name: str, args: tuple, kwargs: dict[str, Any]) -> None:
        """Add the input of a layer that is called."""
        if self.sums is not None and name in self.modules:
            x = args[0] if args else next(iter(kwargs.values()))
            self.sums.add(name, x, None if self.masks is None else self.masks.of(name, x))

    def _enter_decoder(self, module: "nn.Module", args: tuple, kwargs: dict[str, Any]) -> None:
        if self.masks is not None:
            self.masks.enter_decoder(module, args, kwargs)


class CollectionPlan:
    """A model, the layers for statistics, and the data."""

    def __init__(self, stored: StoredModel, options: StatsOptions, batches: Sequence[Batch]):
        if options.compat and "pca" in options.what:
            raise Refused(
                "pca cannot be combined with compat peft, whose covariance is of scaled inputs",
                expected="one of them",
                where="compat",
                hint="remove --compat, or pca",
                code="AK102",
            )
        self.stored, self.options, self.batches = stored, options, batches
        self.runs = [(block_of(n, len(batches)), batch) for n, batch in enumerate(batches)]
        self.model, self.notes = stored.model, stored.notes
        names = [n for n, module in self.model.named_modules() if is_linear(module)]
        targets, lacking = options.targets or ALL_LINEAR, "no linear layer"
        given = (targets, names, lacking, self.notes, CalledLayers)
        self.targets = select_layers(stored.names, *given)
        self.gradients = "gradient" in options.what
        self.inputs = tuple(name for name in options.what if name in INPUTS)
        self.units = OffloadedLayers.of(stored)
        if not batches:
            raise Refused(
                "there are no data", expected="one batch or more", where="data", code="AK902"
            )
        if self.gradients:
            self._check_labels()
        if takes_rows(options) and any(_samples(batch) > 1 for batch in batches):
            raise Refused(
                "batches have several rows, with compat peft",
                expected="one row in each, as PEFT's preprocess_corda takes them",
                where="data",
                hint="remove --compat, or give the rows one by one",
                code="AK902",
            )
        self._check_parameters()
        self.runs_whole_model = options.whole_model or not self.units.has_layers
        if self.runs_whole_model and not options.whole_model:
            self.notes.append("the model has no list of layers, so it was run as a whole")

    def _check_labels(self) -> None:
        """`Refused` if a batch has no labels."""
        without = sum("labels" not in batch for batch in self.batches)
        if without:
            raise Refused(
                f"{without} of {len(self.batches)} batches have no labels, which gradients need",
                expected="labels, from which the model computes its loss",
                where="data",
                hint="remove gradient from --what",
                code="AK902",
            )

    @property
    def head(self) -> OffloadedLayer | None:
        """The output layer, if it is a unit and not needed."""
        head = self.model.get_output_embeddings()
        units = [unit for unit in self.units.outer if unit.module is head]
        needed = self.gradients or (units and units[0].name in self.targets)
        return units[0] if units and not needed else None

    def _check_parameters(self) -> None:
        """`Refused` for parameters that are not stored and may be needed; those after all layers
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
                hint="save the model with all of its parameters",
                code="AK902",
            )
        if absent:
            self.notes.append(f"zero, because it is not stored: {listed(absent)}")

    def arguments(self, batch: Batch) -> Json:
        """Arguments of the model's forward: without labels if no loss is needed, unless the
        decoder's inputs are made of them."""
        decodes = getattr(self.model.config, "is_encoder_decoder", False)
        if self.gradients or decodes:
            return dict(batch)
        return {key: value for key, value in batch.items() if key != "labels"}

    def sums(self) -> Sums:
        return Sums(self.inputs, self.options.components, self.options.compat == "peft")

    def is_transposed(self, module: str) -> bool:
        """True if a layer's weight is (in, out)."""
        return type(self.model.get_submodule(module)).__name__ == TRANSPOSED

    def watch(self) -> SumsWatch:
        """Hooks on the layers; none if no statistics of inputs are collected."""
        layers = {name: self.model.get_submodule(name) for name in self.targets if self.inputs}
        return SumsWatch(self.model, layers)

    def masks(self, watch: SumsWatch, batch: Batch) -> Masks | None:
        """Masks of the tokens of a batch that count; None: all, as for CorDA's own covariance."""
        return watch.masks_of(batch) if self.inputs and self.options.compat is None else None

    def loss(self, output: object) -> Tensor:
        """The loss of a model's output."""
        loss = getattr(output, "loss", None)
        if not isinstance(loss, Tensor):
            raise Refused(
                f"{type(self.model).__name__} computes no loss",
                expected="a model that computes a loss from labels, such as a causal LM",
                where=self.stored.base.name,
                hint="remove gradient from --what",
                code="AK902",
            )
        return loss


def block_of(number: int, batches: int) -> int:
    """The block of a batch."""
    return number * min(BLOCKS, batches) // batches


def tokens_of(batch: Batch) -> int:
    """The number of a batch's tokens that count, without the decoder's; for images, their
    number."""
    mask = token_masks(batch)[0]
    if mask is not None:
        return int(mask.sum())
    ids = batch.get("input_ids")
    return int(ids.numel()) if ids is not None else _samples(batch)


def _samples(batch: Batch) -> int:
    return len(next(iter(batch.values())))

"""Run models on samples one layer at a time, and measure their predictions.

Several models go through their layers together. As long as the layers of one have the same values
as those of an earlier one, it takes over their outputs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.checkpoint.reader import Sources, same_bytes
from adapterkit.core.engine.device import exact_arithmetic
from adapterkit.core.weights.codec import QuantizedWeight, stored_parts
from adapterkit.kernels.rows import row_ranges
from adapterkit.verbs.score.variants import PlannedReader, PlannedTensor, Variant
from adapterkit.verbs.stats.data.samples import Samples
from adapterkit.verbs.stats.model.activations import Activations, ActivationStore, Saved
from adapterkit.verbs.stats.model.layers import OffloadedLayer, OffloadedLayers
from adapterkit.verbs.stats.model.layerwise_schedule import (
    LayerwiseSchedule,
    Pass,
    PassReader,
    ResumePoint,
    next_unit,
)
from adapterkit.verbs.stats.model.predictions import Predictions
from adapterkit.verbs.stats.model.stored_model import StoredModel

CONVERTED = 1 << 22  # elements of a weight that are converted at a time
TOGETHER = 1024  # passes; each waits in a thread of its own
# (number of the sample, logits (n, vocabulary) float32, the tokens there (n,), the reference's
# logits if there is one)
Measure = Callable[[int, Tensor, Tensor, Tensor | None], None]
Inputs = list[tuple[int, dict[str, Tensor]]]  # numbers of samples, and arguments of the forward


def run(
    variants: Sequence[Variant],
    samples: Samples,
    measures: Sequence[Measure],
    *,
    device: torch.device,
    dtype: torch.dtype | None,
    work: Path,
    memory: int,
    step: Callable[[], None] = lambda: None,
    compared: bool = False,
    group: int = TOGETHER,
    first: int = 0,
    finished: Callable[[int], None] = lambda count: None,
) -> None:
    """Call each model's measure with its predictions of each sample, at the positions whose next
    token counts. `compared`: with those of the first model too, the reference. Groups of
    samples run from the first, at most `group` of them; then `finished` is called with the number
    of samples that are done.

    Samples run one by one, so results do not depend on the others, and no token is padding. Memory
    has one layer, one sample's activations, and waiting ones up to `memory` bytes; the rest is in a
    nameless file in `work`. `step` is called for each sample and layer of each model. Raises
    `Refused` for models whose layers cannot run alone."""
    with ExitStack() as stack:
        stack.enter_context(exact_arithmetic(device))
        store = stack.enter_context(closing(ActivationStore(work, memory)))
        models: list[OpenModel] = []
        for variant, measure in zip(variants, measures, strict=True):
            sources = stack.enter_context(Sources(variant.folders, {}))
            kind = PlannedReader
            stored = StoredModel(variant.base, sources, device, dtype=dtype, reader=kind)
            reference = models[0] if compared and models else None
            head = _Head(stored, store, compared and not models, reference and reference.head)
            stack.enter_context(head.replaced())
            models.append(OpenModel(variant, stored, head, measure, store, step))
        each = max(1, min(group, TOGETHER // len(models)))
        for start in range(first, len(samples.samples), each):
            part = samples.samples[start : start + each]
            inputs = [(start + n, samples.batch([sample])) for n, sample in enumerate(part)]
            # a reference first
            layerwise = [one for one in models[compared:] if one.units.has_layers]
            whole = [one for one in models[compared:] if one not in layerwise]
            if compared and models[0].units.has_layers:
                layerwise.insert(0, models[0])
            elif compared:
                models[0].run_whole(inputs)
            _run_together(layerwise, inputs)
            for one in whole:
                one.run_whole(inputs)
            finished(start + len(part))


@dataclass(eq=False)
class OpenModel:
    """A model, and what its predictions are measured by."""

    variant: Variant
    stored: StoredModel
    head: "_Head"
    measure: Measure
    store: ActivationStore
    step: Callable[[], None]

    @cached_property
    def units(self) -> OffloadedLayers:
        return OffloadedLayers.of(self.stored)

    def predict(self, batch: Mapping[str, Tensor], number: int) -> None:
        """Measure the predictions of one sample."""
        with torch.no_grad():
            logits, labels = Predictions(self.stored.model).counted(batch)
            own, *others = logits
            self.measure(number, own, labels, others[0] if others else None)

    def run_whole(self, inputs: Inputs) -> None:
        """Run samples with the whole model in memory."""
        stored, names = self.stored, self.stored.parameters()
        stored.load(names, stored.device)
        try:
            with stored.buffers_on_device(stored.model), self.head.reference_loaded():
                for number, batch in inputs:
                    self.head.number = number
                    moved = {key: value.to(stored.device) for key, value in batch.items()}
                    self.predict(moved, number)
                    self.step()
        finally:
            stored.free(names)

    @contextmanager
    def started(self, inputs: Inputs) -> Iterator["Lane"]:
        """The model's passes, with the parameters outside of its layers in memory."""
        numbers = {id(batch): number for number, batch in inputs}
        predict = lambda batch: self.predict(batch, numbers[id(batch)])
        self.head.numbers = [number for number, _ in inputs]
        schedule = SharingSchedule(self.stored, self.units, self.head, self.store, None, self.step)
        self.stored.as_stored = self.head.large_parameters.difference(self.units.outside)
        self.stored.load(self.units.outside, torch.device("cpu"))
        try:
            batches = [(0, batch) for _, batch in inputs]
            with schedule.started(batches, predict, [None] * len(batches)) as passes:
                yield Lane(self, schedule, passes)
        finally:
            self.stored.free(self.units.outside)
            self.stored.as_stored = set()

    def has_same(self, other: "OpenModel", names: Sequence[str]) -> bool:
        """Return whether these parameters have the same values in both models."""
        for name in names:
            own, theirs = (one.stored.stored_parameter(name) for one in (self, other))
            if own is None or theirs is None:
                return own is theirs
            if own.parameter.slots != theirs.parameter.slots:
                return False
            pairs = zip(own.tensors.values(), theirs.tensors.values(), strict=True)
            if not all(self._same_tensor(other, *pair) for pair in pairs):
                return False
        return True

    def _same_tensor(self, other: "OpenModel", own: TensorSpec, theirs: TensorSpec) -> bool:
        folders, others = (
            [folder.label for folder in one.variant.folders] for one in (self, other)
        )
        if folders == others and own == theirs:
            return True
        if isinstance(own, PlannedTensor) or isinstance(theirs, PlannedTensor):
            return False
        if _apart_from_place(own) != _apart_from_place(theirs):
            return False
        place = lambda one, spec: (one.variant.folders[spec.folder], spec)
        pairs = zip(stored_parts(own), stored_parts(theirs), strict=True)
        return all(same_bytes(place(self, a), place(other, b)) for a, b in pairs)


def _apart_from_place(spec: TensorSpec) -> TensorSpec:
    same = {"file": "", "start": 0, "stop": spec.nbytes, "folder": 0}
    if isinstance(spec, QuantizedWeight):
        return replace(spec, parts=tuple(map(_apart_from_place, spec.parts)), **same)
    return replace(spec, **same)


@dataclass
class SharingSchedule(LayerwiseSchedule):
    """The passes of a model, whose outputs of the last unit are kept for others if `keeps`."""

    keeps: bool = False
    kept: dict[int, list[Any]] = field(default_factory=dict)  # by pass, in the order of the calls

    def _begin(self, one: Pass) -> ResumePoint:
        begun = super()._begin(one)
        if self.keeps:
            begun.mark.wait()
            save = Activations(self.store, 1, set()).save
            output = tree_map(lambda x: save(x) if isinstance(x, Tensor) else x, begun.answer)
            self.kept.setdefault(one.number, []).append(output)
        return begun

    def answer(self, one: Pass, kept: Any) -> None:
        """Continue a pass with an output of another model's unit."""
        one.activations.restore()
        output = tree_map(lambda x: x.tensor() if isinstance(x, Saved) else x, kept)
        one.activations.track(output, is_output=True)
        self.step()
        self._go_on(one, output)


@dataclass(eq=False)
class Lane:
    """A model's way through its units; `leader`: one with the same values so far."""

    model: OpenModel
    schedule: SharingSchedule
    passes: list[Pass]
    leader: "Lane | None" = None

    @property
    def waiting(self) -> list[Pass]:
        return [one for one in self.passes if one.request is not None]

    @property
    def order(self) -> tuple[bool, int]:
        """The order of the next unit; a head that compares comes after all others."""
        unit, head = next_unit(self.waiting), self.model.head
        return unit.module is head.module and head.reference is not None, unit.order

    def is_like(self, other: "Lane") -> bool:
        """Return whether both are one kind of model, and the same outside of the units."""
        own, others = (one.model.stored for one in (self, other))
        is_kind = type(own.model) is type(others.model) and _settings(own) == _settings(others)
        # a unit's may differ too, for example the bias of a router
        buffers = {*own.stored_buffers, *others.stored_buffers}
        return is_kind and self.model.has_same(other.model, [*self.model.units.outside, *buffers])

    def visit(self, followers: Sequence["Lane"]) -> None:
        """Run the next unit, and give its outputs to the lanes whose unit has the same values."""
        unit = next_unit(self.waiting)
        own = [lane for lane in followers if lane.leader is self]
        for lane in own:
            if not lane.waits_for_same(unit):
                lane.leader = None
        own = [lane for lane in own if lane.leader is self]
        self.schedule.keeps = bool(own)
        self.schedule.visit(unit, self.waiting)
        for lane in own:
            for one in lane.waiting:
                for kept in self.schedule.kept.get(one.number, ()):
                    lane.schedule.answer(one, kept)
        self.schedule.kept.clear()

    def waits_for_same(self, unit: OffloadedLayer) -> bool:
        """Return whether all passes wait for a unit that has the values of the leader's. A head
        is never the same, because a reference's own has no other to predict for."""
        assert self.leader is not None
        if unit.module is self.leader.model.head.module:
            return False
        stops = {one.request.unit.name for one in self.waiting}
        return stops == {unit.name} and self.model.has_same(self.leader.model, unit.parameters)


def _settings(stored: StoredModel) -> dict:
    """A model's settings, without those that change no value."""
    settings = stored.model.config.to_dict()
    unread = ("dtype", "torch_dtype", "_name_or_path", "transformers_version", "architectures")
    return {key: value for key, value in settings.items() if key not in unread}


def _run_together(models: Sequence[OpenModel], inputs: Inputs) -> None:
    """Run models through their layers, the one that is furthest behind first, and to a head that
    compares last: it needs what the reference's head was given."""
    with ExitStack() as stack:
        lanes = [stack.enter_context(one.started(inputs)) for one in models]
        for number, lane in enumerate(lanes):
            free = (other for other in lanes[:number] if other.leader is None)
            lane.leader = next(filter(lane.is_like, free), None)
        while True:
            going = [lane for lane in lanes if lane.leader is None and lane.waiting]
            if not going:
                return
            min(going, key=lambda lane: lane.order).visit(lanes)


class _Head(PassReader):
    """The output layer of a model. It keeps its inputs, if it is a reference's; else it predicts
    from the reference's with the reference's weights too."""

    def __init__(
        self, stored: StoredModel, store: ActivationStore, keeps: bool, reference: "_Head | None"
    ):
        self.stored, self.store, self.keeps, self.reference = stored, store, keeps, reference
        self.module: Any = stored.model.get_output_embeddings()
        self.states: dict[int, Saved | Tensor] = {}  # by the sample's number
        self.number = 0  # of the sample that runs
        self.numbers: list[int] = []  # by pass

    @contextmanager
    def replaced(self) -> Iterator[None]:
        """Replace the layer's forward, and that of the embedding, inside the context."""
        embedding: Any = self.stored.model.get_input_embeddings()
        self.large = {embedding} if type(embedding) is nn.Embedding else set()
        self.large |= {self.module} if type(self.module) is nn.Linear else set()
        embed = lambda ids: nn.Embedding.forward(embedding, ids).to(self.stored.dtype)
        if embedding in self.large:
            vars(embedding)["forward"] = embed
        if self.module is not None:
            vars(self.module)["forward"] = self._predict
        try:
            yield
        finally:
            for module in {embedding, self.module}:
                vars(module).pop("forward", None)

    @property
    def large_parameters(self) -> set[str]:
        """Weights of the vocabulary's size, which are converted while they are used."""
        named = self.stored.model.named_modules()
        names = [name for name, module in named if module in self.large]
        return {name for one in names for name in self.stored.parameters(one)}

    def compute(self, x: Tensor) -> Tensor:
        """The layer's output (..., vocabulary). A weight in another dtype is converted by rows."""
        module = self.module
        if module not in self.large or module.weight.dtype == x.dtype:
            return type(module).forward(module, x)
        count, width = module.weight.shape
        y = x.new_empty(*x.shape[:-1], count)
        for first, last in row_ranges(count, width, CONVERTED):
            y[..., first:last] = F.linear(x, module.weight[first:last].to(x))
        return y if module.bias is None else y.add_(module.bias.to(x))

    def _predict(self, x: Tensor) -> Tensor:
        if self.keeps:
            self.states[self.number] = Activations(self.store, 1, set()).save(x.cpu())
        if self.reference is None:
            return self.compute(x)
        kept = self.reference.states[self.number]
        state = kept.tensor() if isinstance(kept, Saved) else kept
        return torch.cat([self.compute(x), self.reference.compute(state.to(x))])

    @contextmanager
    def reference_loaded(self) -> Iterator[None]:
        """Load the reference's layer inside the context."""
        if self.reference is None:
            yield
            return
        stored, module = self.reference.stored, self.reference.module
        name = next(name for name, one in stored.model.named_modules() if one is module)
        names = stored.parameters(name)
        stored.load(names, stored.device)
        try:
            yield
        finally:
            stored.free(names)

    @contextmanager
    def visited(self, unit: OffloadedLayer) -> Iterator[None]:
        with self.reference_loaded() if unit.module is self.module else ExitStack():
            yield

    def begin(self, one: Pass, unit: OffloadedLayer | None, is_backward: bool) -> None:
        self.number = self.numbers[one.number]

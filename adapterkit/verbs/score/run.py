"""Run a model on samples one layer at a time, and measure its predictions."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapterkit.core.checkpoint.reader import Sources
from adapterkit.core.engine.device import exact_arithmetic
from adapterkit.verbs.score.variants import PlannedReader, Variant
from adapterkit.verbs.stats.data.samples import Sample, Samples
from adapterkit.verbs.stats.model.activations import Activations, ActivationStore, Saved
from adapterkit.verbs.stats.model.layers import OffloadedLayer, OffloadedLayers
from adapterkit.verbs.stats.model.layerwise_schedule import LayerwiseSchedule, Pass, PassReader
from adapterkit.verbs.stats.model.predictions import Predictions
from adapterkit.verbs.stats.model.stored_model import StoredModel

ROUND = 512  # samples that go through the model together; each waits in a thread of its own
# (number of the sample, logits (n, vocabulary) float32, the tokens there (n,), the reference's
# logits if there is one)
Measure = Callable[[int, Tensor, Tensor, Tensor | None], None]


@dataclass
class Reference:
    """A model whose predictions others are compared with: the inputs of its head for each sample.
    The head predicts from them again, in the same call as another model's, so no logits are
    kept."""

    variant: Variant
    states: dict[int, Saved | Tensor] = field(default_factory=dict)  # by the sample's number


def run(
    variant: Variant,
    samples: Samples,
    measure: Measure,
    *,
    device: torch.device,
    dtype: torch.dtype | None,
    work: Path,
    memory: int,
    step: Callable[[], None] = lambda: None,
    records: Reference | None = None,
    against: Reference | None = None,
) -> None:
    """Call `measure` with the predictions of each sample, at its positions whose next token counts.

    Samples run one by one, so results do not depend on the others, and no token is padding. Memory
    has one layer, one sample's activations, and waiting ones up to `memory` bytes; the rest is in a
    nameless file in `work`. `records`: a reference that is to be of this model; `against`: the one
    that predictions are compared with. `step` is called for each sample and layer. Raises `Refused`
    for models whose layers cannot run alone."""
    with ExitStack() as stack:
        sources = stack.enter_context(Sources(variant.folders, {}))
        stack.enter_context(exact_arithmetic(device))
        stack.enter_context(torch.inference_mode(False))
        stored = StoredModel(variant.base, sources, device, dtype=dtype, reader=PlannedReader)
        store = stack.enter_context(closing(ActivationStore(work, memory)))
        head = _Head(stored, store, records, against)
        stack.enter_context(head.watching(device, dtype))
        one = ModelRun(stored, OffloadedLayers.of(stored), store, head, measure, step)
        numbered = list(enumerate(samples.samples))
        for first in range(0, len(numbered), ROUND):
            one.run([(n, s, samples) for n, s in numbered[first : first + ROUND]])


@dataclass
class ModelRun:
    """Runs of one model; `measure` gets the results."""

    stored: StoredModel
    units: OffloadedLayers
    store: ActivationStore
    head: "_Head"
    measure: Measure
    step: Callable[[], None]

    def run(self, samples: Sequence[tuple[int, Sample, Samples]]) -> None:
        """Run some samples, in this order."""
        predictions = Predictions(self.stored.model)
        inputs = [its.batch([sample]) for _, sample, its in samples]
        numbers = {id(batch): number for batch, (number, *_) in zip(inputs, samples, strict=True)}

        def predict(batch: Mapping[str, Tensor]) -> None:
            with torch.no_grad():
                logits, labels = predictions.counted(batch)
                own, *others = logits
                self.measure(numbers[id(batch)], own, labels, others[0] if others else None)

        whole = not self.units.has_layers
        names = self.stored.parameters() if whole else self.units.outside
        device = self.stored.device if whole else torch.device("cpu")
        self.stored.load(names, device)
        try:
            if whole:
                self._run_whole(inputs, numbers, predict)
                return
            schedule = LayerwiseSchedule(
                self.stored, self.units, self.head, self.store, None, self.step
            )
            self.head.numbers = [numbers[id(batch)] for batch in inputs]
            schedule.run([(0, batch) for batch in inputs], predict, [None] * len(inputs))
        finally:
            self.stored.free(names)

    def _run_whole(
        self,
        inputs: Sequence[Mapping[str, Tensor]],
        numbers: Mapping[int, int],
        predict: Callable[[Mapping[str, Tensor]], None],
    ) -> None:
        device = self.stored.device
        with self.stored.buffers_on_device(self.stored.model), self.head.loaded():
            for batch in inputs:
                self.head.number = numbers[id(batch)]
                moved = {key: value.to(device) for key, value in batch.items()}
                numbers = {**numbers, id(moved): self.head.number}
                predict(moved)
                self.step()


class _Head(PassReader):
    """Keeps the inputs of the model's head, or lets a reference's head predict from its own next to
    it."""

    def __init__(
        self,
        stored: StoredModel,
        store: ActivationStore,
        records: Reference | None,
        against: Reference | None,
    ):
        self.module: Any = stored.model.get_output_embeddings()
        self.store, self.records, self.against = store, records, against
        self.number = 0  # of the sample that runs
        self.numbers: list[int] = []  # by pass
        self.other: StoredModel | None = None  # the reference's, of which only the head is loaded

    @contextmanager
    def watching(self, device: torch.device, dtype: torch.dtype | None) -> Iterator[None]:
        """Replace the head's forward inside the context."""
        if self.module is None or (self.records is None and self.against is None):
            yield
            return
        forward = self.module.forward
        with ExitStack() as stack:
            if self.against is not None:
                variant = self.against.variant
                sources = stack.enter_context(Sources(variant.folders, {}))
                kind = PlannedReader
                self.other = StoredModel(variant.base, sources, device, dtype=dtype, reader=kind)
            self.module.forward = lambda x: self._predict(forward, x)
            stack.callback(vars(self.module).pop, "forward")
            yield

    def _predict(self, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if self.records is not None:
            saved = Activations(self.store, 1, set()).save(x)
            self.records.states[self.number] = saved
        if self.against is None or self.other is None:
            return forward(x)
        kept = self.against.states[self.number]
        state = kept.tensor() if isinstance(kept, Saved) else kept
        other = self.other.model.get_output_embeddings()(state.to(x))
        return torch.cat([forward(x), other])

    @contextmanager
    def loaded(self) -> Iterator[None]:
        """Load the reference's head inside the context."""
        if self.other is None:
            yield
            return
        model = self.other.model
        name = next(n for n, one in model.named_modules() if one is model.get_output_embeddings())
        names = self.other.parameters(name)
        self.other.load(names, self.other.device)
        try:
            yield
        finally:
            self.other.free(names)

    @contextmanager
    def visited(self, unit: OffloadedLayer) -> Iterator[None]:
        with self.loaded() if unit.module is self.module else ExitStack():
            yield

    def begin(self, one: Pass, unit: OffloadedLayer | None, is_backward: bool) -> None:
        self.number = self.numbers[one.number]

"""Run the model with its adapters on samples: losses, and their gradients by the coefficients."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from adapterkit.verbs.fit.objective import Objective
from adapterkit.verbs.fit.weighted_adapters import Acting, WeightedModel, WeightedModule
from adapterkit.verbs.stats.model.activations import ActivationStore
from adapterkit.verbs.stats.model.layers import OffloadedLayer, OffloadedLayers, is_within
from adapterkit.verbs.stats.model.layerwise_schedule import LayerwiseSchedule, Pass, PassReader
from adapterkit.verbs.stats.model.stored_model import StoredModel

Step = Callable[[], None]


@dataclass(frozen=True)
class FitBatch:
    """Samples of one file that run together: arguments of the model's forward, (rows, ...) each;
    `weights` (rows,): of their losses in the file's loss; `samples`: their numbers."""

    inputs: Mapping[str, Tensor]
    weights: Tensor
    samples: tuple[int, ...]
    file: int

    def total(self, losses: Tensor) -> Tensor:
        """The batch's share of its file's loss."""
        return (losses * self.weights.to(losses)).sum()


Compute = Callable[[FitBatch], Tensor]


@dataclass
class Runs:
    """Run a stored model with weighted adapters, whole or one layer at a time. `step` is called for
    each batch, of a layer or of the model."""

    stored: StoredModel
    weighted_model: WeightedModel
    units: OffloadedLayers
    target: Objective
    whole: bool
    work: Path
    memory: int
    step: Step

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Attach the adapters; a whole model is loaded into memory."""
        names = self.stored.parameters() if self.whole else self.units.outside
        device = self.stored.device if self.whole else torch.device("cpu")
        with ExitStack() as stack:
            self.stored.load(names, device)
            stack.callback(self.stored.free, names)
            stack.enter_context(self.weighted_model.attached())
            stack.enter_context(self.target.watching(self.weighted_model))
            places = self._places(None)
            self.weighted_model.load(places, device, self.stored.dtype)
            stack.callback(self.weighted_model.free, places)
            if self.whole:
                stack.enter_context(self.stored.buffers_on_device(self.stored.model))
            yield

    def _places(self, unit: OffloadedLayer | None) -> list[WeightedModule]:
        """Adapted modules in a unit; for None, those that are always in memory."""
        if unit is not None:
            return [one for one in self.weighted_model.places if is_within(one.path, [unit.name])]
        outside = lambda one: self.whole or self.units.unit_of(one.path) is None
        return list(filter(outside, self.weighted_model.places))

    def number(self, directions: bool) -> None:
        """Number the coefficients again: by adapter and module, or by direction."""
        self.weighted_model.number(directions)
        device = self.stored.device if self.whole else torch.device("cpu")
        self.weighted_model.load(self._places(None), device, self.stored.dtype)

    @contextmanager
    def loaded(self, place: WeightedModule) -> Iterator[None]:
        """Load the factors of a module for the duration of the context."""
        if place in self._places(None):
            yield
            return
        self.weighted_model.load([place], torch.device("cpu"), self.stored.dtype)
        try:
            yield
        finally:
            self.weighted_model.free([place])

    def losses(self, c: Tensor, batches: Sequence[FitBatch]) -> Tensor:
        """(samples,) in float64, in nats per token that counts, in the order of the batches; `c`:
        (coefficients,)."""
        return self.run(c, batches, self.target.losses)[0]

    def gradients(self, c: Tensor, batches: Sequence[FitBatch]) -> tuple[Tensor, Tensor]:
        """`losses`, and the gradient (files, coefficients) of each file's loss."""
        losses, own = self.run(c, batches, self.target.losses, gradients=True)
        files = torch.tensor([batch.file for batch in batches])
        rows = own.new_zeros(int(files.max()) + 1, len(c))
        return losses, rows.index_add_(0, files, own)

    def run(
        self, c: Tensor, batches: Sequence[FitBatch], compute: Compute, gradients: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The results of `compute` for the samples, and for each batch the gradient of its weighted
        sum, or c."""
        one = Evaluation(c, batches, compute, gradients, self.stored.dtype)
        (self._run_whole if self.whole else self._run_layerwise)(one)
        return torch.cat(one.results).double(), torch.stack(one.sums).detach().double()

    def _run_whole(self, one: "Evaluation") -> None:
        for number, (batch, acting) in enumerate(zip(one.batches, one.acting, strict=True)):
            self.weighted_model.acting = acting
            moved = {key: value.to(self.stored.device) for key, value in batch.inputs.items()}
            total = one.record_losses(number, replace(batch, inputs=moved))
            if total is not None:
                (one.sums[number],) = torch.autograd.grad(total, acting.own)
            self.step()

    def _run_layerwise(self, one: "Evaluation") -> None:
        by_inputs = {id(batch.inputs): number for number, batch in enumerate(one.batches)}

        def loss(inputs: Mapping[str, Tensor]) -> Tensor | None:
            number = by_inputs[id(inputs)]
            return one.record_losses(number, one.batches[number])

        with closing(ActivationStore(self.work, self.memory)) as store:
            reader = CoefficientsReader(self, one)
            schedule = LayerwiseSchedule(self.stored, self.units, reader, store, None, self.step)
            inputs = [(0, batch.inputs) for batch in one.batches]
            schedule.run(inputs, loss, [None] * len(inputs))
        for acting, total in zip(one.acting, one.sums, strict=True):
            if one.gradients and acting.own.grad is not None:  # of modules outside the layers
                total += acting.own.grad


class Evaluation:
    """Batches at a point, each with its own coefficients that get a gradient: `acting`; `results`,
    `sums`: losses (rows,) and gradients (coefficients,) of each batch."""

    def __init__(
        self,
        c: Tensor,
        batches: Sequence[FitBatch],
        compute: Compute,
        gradients: bool,
        dtype: torch.dtype,
    ):
        self.batches, self.compute, self.gradients = batches, compute, gradients
        kind = torch.promote_types(dtype, torch.float32)
        leaves = [c.to(kind, copy=True).requires_grad_(gradients) for _ in batches]
        self.acting = [*map(Acting, leaves)]
        self.results = [torch.empty(0)] * len(batches)
        self.sums = [torch.zeros_like(leaf) if gradients else leaf for leaf in leaves]

    def record_losses(self, number: int, batch: FitBatch) -> Tensor | None:
        """Keep a batch's losses; return the sum to differentiate, if any."""
        with torch.set_grad_enabled(self.gradients):
            values = self.compute(batch)
            self.results[number] = values.detach().to("cpu", copy=True)
            return batch.total(values) if self.gradients else None


class CoefficientsReader(PassReader):
    """Collect the gradients of each pass's coefficients; factors are in memory with their unit."""

    def __init__(self, runs: Runs, evaluation: Evaluation):
        self.runs, self.evaluation, self.gradients = runs, evaluation, evaluation.gradients

    @contextmanager
    def visited(self, unit: OffloadedLayer) -> Iterator[None]:
        places, stored = self.runs._places(unit), self.runs.stored
        self.runs.weighted_model.load(places, stored.device, stored.dtype)
        try:
            yield
        finally:
            self.runs.weighted_model.free(places)

    def begin(self, one: Pass, unit: OffloadedLayer | None, is_backward: bool) -> None:
        self.runs.weighted_model.acting = self.evaluation.acting[one.number]

    def wants(self, unit: OffloadedLayer) -> bool:
        return self.gradients and bool(self.runs._places(unit))

    def wanted(self, one: Pass, unit: OffloadedLayer) -> dict[str, Tensor]:
        return {"": self.evaluation.acting[one.number].own} if self.wants(unit) else {}

    def take(self, one: Pass, name: str, gradient: Tensor) -> None:
        self.evaluation.sums[one.number] += gradient

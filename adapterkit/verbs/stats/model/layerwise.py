"""Run a model one layer at a time, from its shards."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from adapterkit.verbs.stats.job import Batch, CollectionPlan, SumsWatch
from adapterkit.verbs.stats.model.activations import ActivationStore
from adapterkit.verbs.stats.model.layers import OffloadedLayer, is_within
from adapterkit.verbs.stats.model.layerwise_schedule import LayerwiseSchedule, Pass, PassReader
from adapterkit.verbs.stats.sums_files import Collected, Ledger, Tally

R = TypeVar("R", bound=PassReader)
Rehearsal = Callable[[OffloadedLayer], AbstractContextManager[bool]]  # as of `LayerwiseSchedule`


class SumsReader(PassReader):
    """Collect sums of layers' inputs, and of the gradients of their weights; `outside`: for layers
    outside the units."""

    tallies: dict[bool, Tally | None]  # of the unit that is visited, forward and backward
    collected: Collected | None = None  # of the pass that runs

    def __init__(self, job: CollectionPlan, ledger: Ledger, watch: SumsWatch):
        self.job, self.ledger, self.watch = job, ledger, watch
        self.gradients, self.outside = job.gradients, ledger.outside()
        self.outer = self._weights(None)
        for weight in self.outer.values():
            weight.requires_grad_(job.gradients)

    def _weights(self, unit: OffloadedLayer | None) -> dict[str, Tensor]:
        """Weights of the targets in a unit, or of those outside all units."""
        units, names = self.job.units, self.job.targets
        inside = lambda n: units.unit_of(n) is None if unit is None else is_within(n, [unit.name])
        return {n: self.job.model.get_submodule(n).weight for n in filter(inside, names)}

    @contextmanager
    def visited(self, unit: OffloadedLayer) -> Iterator[None]:
        self.tallies = {}
        yield
        for tally in filter(None, self.tallies.values()):
            tally.close()

    def begin(self, one: Pass, unit: OffloadedLayer | None, is_backward: bool) -> None:
        if unit is not None and is_backward not in self.tallies:
            self.tallies[is_backward] = self.ledger.of_unit(unit, is_backward)
        tally = self.outside if unit is None else self.tallies[is_backward]
        self.collected = None if tally is None else tally.of(one.block)
        self.watch.masks = one.masks
        self.watch.sums = None
        if self.collected is not None and not is_backward:
            self.watch.sums = self.collected.sums

    def end(self, one: Pass, unit: OffloadedLayer | None, is_backward: bool) -> None:
        if self.watch.sums is not None:
            self.watch.sums.settle()
        for name, weight in self.outer.items() if unit is None else ():
            if weight.grad is not None and self.collected is not None:
                self.collected.add_gradient(name, weight.grad)
                weight.grad = None

    def wants(self, unit: OffloadedLayer) -> bool:
        return bool(self._weights(unit))

    def wanted(self, one: Pass, unit: OffloadedLayer) -> dict[str, Tensor]:
        weights = {} if self.collected is None else self._weights(unit)
        return {name: weight.requires_grad_() for name, weight in weights.items()}

    def take(self, one: Pass, name: str, gradient: Tensor) -> None:
        assert self.collected is not None
        self.collected.add_gradient(name, gradient)

    def record_input(self, unit: OffloadedLayer, args: tuple, kwargs: dict[str, Any]) -> None:
        self.watch.record_input(unit.name, args, kwargs)


def run_layerwise(
    job: CollectionPlan,
    reader_of: Callable[[SumsWatch], R],
    store: ActivationStore,
    progress: Callable[[int, int], None],
    rehearsal: Rehearsal | None = None,
) -> R:
    """Run all batches through one layer, then the next; return the reader. `store`: the store of
    waiting activations."""
    stored, units = job.stored, job.units
    steps = len(job.runs) * len(units.outer) * (2 if job.gradients else 1)
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        progress(min(done, steps - 1), steps)

    stored.load(units.outside, torch.device("cpu"))
    try:
        with job.watch() as watch:
            watch.stops = {unit.module for unit in (*units.outer, *units.inner)}
            reader = reader_of(watch)
            masks = [job.masks(watch, batch) for _, batch in job.runs]
            schedule = LayerwiseSchedule(stored, units, reader, store, job.head, step, rehearsal)
            schedule.run(job.runs, partial(_loss, job), masks)
    finally:
        stored.free(units.outside)
    progress(steps, steps)
    return reader


def _loss(job: CollectionPlan, batch: Batch) -> Tensor | None:
    """The loss to differentiate in a batch's pass; None without gradients."""
    with torch.set_grad_enabled(job.gradients):
        output = job.model(**job.arguments(batch))
        return job.loss(output) if job.gradients else None

"""A model run one layer at a time, from its shards."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from adapterkit.statistics.activations import Room
from adapterkit.statistics.job import Batch, Job
from adapterkit.statistics.ledger import Ledger
from adapterkit.statistics.lockstep import Lockstep, Stage
from adapterkit.statistics.units import Unit, is_within
from adapterkit.statistics.work import SumsFile


def run_layerwise(
    job: Job, work: Path, memory: int, progress: Callable[[int, int], None]
) -> list[SumsFile]:
    """All batches through one layer, then the next. `memory`: bytes of activations that wait in
    memory, before they go to a file in `work`."""
    stored, units = job.stored, job.units
    ledger = Ledger(work, job.sums, len(job.batches), job.is_transposed)
    steps = len(job.batches) * len(units.outer) * (2 if job.gradients else 1)
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        progress(min(done, steps - 1), steps)

    def begin(unit: Unit) -> Stage:
        has_sums = any(is_within(name, [unit.name]) for name in job.watched)
        has_gradients = any(is_within(name, [unit.name]) for name in job.targets)
        return ledger.stage(unit, has_sums and bool(job.inputs), has_gradients and job.gradients)

    is_outside = any(units.unit_of(name) is None for name in job.watched)
    outside = Stage(
        lambda: job.sums() if is_outside and job.inputs else None,
        lambda: {} if job.gradients else None,
    )
    room = Room(work, memory)
    stored.load(units.outside, torch.device("cpu"))
    try:
        with job.watch() as watch:
            lockstep = Lockstep(
                stored, units, watch, job.targets, room, job.head, outside, begin, ledger.finish,
                step,
            )  # fmt: skip
            masks = [job.masks(watch, batch) for batch in job.batches]
            lockstep.run(job.batches, partial(_loss, job), masks)
    finally:
        stored.free(units.outside)
        room.close()
    ledger.write_outside(outside)
    progress(steps, steps)
    return [ledger.files[name] for name in sorted(ledger.files)]


def _loss(job: Job, batch: Batch) -> Tensor | None:
    """What a batch's pass computes."""
    with torch.set_grad_enabled(job.gradients):
        output = job.model(**job.arguments(batch))
        return job.loss(output) if job.gradients else None

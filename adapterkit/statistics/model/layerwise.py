"""A model run one layer at a time, from its shards."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from adapterkit.statistics.job import Batch, CollectionJob
from adapterkit.statistics.ledger import Ledger
from adapterkit.statistics.model.activations import ActivationStore
from adapterkit.statistics.model.lockstep import Lockstep, UnitSums


def run_layerwise(
    job: CollectionJob, ledger: Ledger, room: ActivationStore, progress: Callable[[int, int], None]
) -> None:
    """All batches through one layer, then the next, as far as the ledger wants it. `room`: for
    activations that wait."""
    stored, units = job.stored, job.units
    steps = len(job.batches) * len(units.outer) * (2 if job.gradients else 1)
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        progress(min(done, steps - 1), steps)

    is_outside = any(units.unit_of(name) is None for name in job.watched)
    outside = UnitSums(
        lambda: job.sums() if is_outside and job.inputs else None,
        lambda: {} if job.gradients else None,
    )
    stored.load(units.outside, torch.device("cpu"))
    try:
        with job.watch() as watch:
            lockstep = Lockstep(
                stored, units, watch, job.targets, room, job.head, outside, ledger.stage,
                ledger.finish, step,
            )  # fmt: skip
            masks = [job.masks(watch, batch) for batch in job.batches]
            came_to_end = lockstep.run(job.batches, partial(_loss, job), masks)
    finally:
        stored.free(units.outside)
    if came_to_end:
        ledger.write_outside(outside)
    progress(steps, steps)


def _loss(job: CollectionJob, batch: Batch) -> Tensor | None:
    """What a batch's pass computes."""
    with torch.set_grad_enabled(job.gradients):
        output = job.model(**job.arguments(batch))
        return job.loss(output) if job.gradients else None

"""A model run one layer at a time, from its shards."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from adapterkit.statistics.job import Batch, CollectionJob
from adapterkit.statistics.model.activations import ActivationStore
from adapterkit.statistics.model.lockstep import Lockstep
from adapterkit.statistics.sums_files import Ledger


def run_layerwise(
    job: CollectionJob, ledger: Ledger, room: ActivationStore, progress: Callable[[int, int], None]
) -> None:
    """All batches through one layer, then the next. `room`: for activations that wait."""
    stored, units = job.stored, job.units
    steps = len(job.runs) * len(units.outer) * (2 if job.gradients else 1)
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        progress(min(done, steps - 1), steps)

    outside = ledger.outside()
    stored.load(units.outside, torch.device("cpu"))
    try:
        with job.watch() as watch:
            lockstep = Lockstep(
                stored, units, watch, job.targets, room, job.head, ledger, outside, job.gradients,
                step,
            )  # fmt: skip
            masks = [job.masks(watch, batch) for _, batch in job.runs]
            lockstep.run(job.runs, partial(_loss, job), masks)
    finally:
        stored.free(units.outside)
    if outside is not None:
        outside.close()
    progress(steps, steps)


def _loss(job: CollectionJob, batch: Batch) -> Tensor | None:
    """What a batch's pass computes."""
    with torch.set_grad_enabled(job.gradients):
        output = job.model(**job.arguments(batch))
        return job.loss(output) if job.gradients else None

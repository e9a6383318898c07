"""A model run as a whole, in memory."""

from collections.abc import Callable

import torch

from adapterkit.statistics.data.masks import following
from adapterkit.statistics.job import CollectionJob
from adapterkit.statistics.ledger import Ledger
from adapterkit.statistics.model.gradients import Gradients


def run_whole(job: CollectionJob, ledger: Ledger, progress: Callable[[int, int], None]) -> None:
    """Batch by batch, unless the ledger has the sums."""
    if not ledger.wants_whole():
        return
    stored, model, sums = job.stored, job.model, job.sums()
    names = stored.parameters()
    stored.load(names, stored.device)
    transposed = {module: job.is_transposed(module) for module in job.targets}
    gradients = Gradients(model, transposed if job.gradients else {})
    try:
        with (
            stored.buffers_on_device(model),
            job.watch() as watch,
            gradients.watching(),
            torch.set_grad_enabled(job.gradients),
        ):
            watch.sums = sums
            for number, batch in enumerate(job.batches):
                on_device = {key: value.to(stored.device) for key, value in batch.items()}
                watch.masks = job.masks(watch, on_device)
                with following(watch.masks):
                    output = model(**job.arguments(on_device))
                if watch.masks is not None:
                    watch.masks.finish()
                if job.gradients:
                    job.loss(output).backward()
                del output
                progress(number + 1, len(job.batches))
        sums.settle()
        ledger.write_whole(sums, dict(gradients.means()))
    finally:
        stored.free(names)

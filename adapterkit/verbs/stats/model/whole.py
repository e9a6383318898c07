"""A model run as a whole, in memory."""

from collections.abc import Callable

import torch

from adapterkit.verbs.stats.data.masks import following
from adapterkit.verbs.stats.job import CollectionPlan
from adapterkit.verbs.stats.model.gradients import Gradients
from adapterkit.verbs.stats.sums_files import WHOLE, Ledger, Tally


def run_whole(job: CollectionPlan, ledger: Ledger, progress: Callable[[int, int], None]) -> None:
    """Batch by batch, but for blocks whose sums are there."""
    stored, model, tally = job.stored, job.model, Tally(ledger, WHOLE)
    todo = [(block, batch) for block, batch in job.runs if not tally.is_done(block)]
    names = stored.parameters()
    if todo:
        stored.load(names, stored.device)
    gradients = Gradients(model, dict.fromkeys(job.targets if job.gradients else (), False))
    try:
        with (
            stored.buffers_on_device(model),
            job.watch() as watch,
            gradients.watching(),
            torch.set_grad_enabled(job.gradients),
        ):
            for number, (block, batch) in enumerate(todo):
                collected = tally.of(block)
                assert collected is not None
                on_device = {key: value.to(stored.device) for key, value in batch.items()}
                watch.sums, watch.masks = collected.sums, job.masks(watch, on_device)
                with following(watch.masks):
                    output = model(**job.arguments(on_device))
                if watch.masks is not None:
                    watch.masks.finish()
                if job.gradients:
                    job.loss(output).backward()
                for module, value in gradients.taken():
                    collected.add_gradient(module, value)
                del output
                progress(number + 1, len(todo))
        tally.close()
    finally:
        stored.free(names)

"""Statistics of a checkpoint's layers from batches of data."""

from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import torch

from adapterkit.checkpoint.folder import Folder
from adapterkit.checkpoint.reader import Sources
from adapterkit.checkpoint.spec import Checkpoint
from adapterkit.checkpoint.system import quarter_of_memory
from adapterkit.engines.hub.sources import BoundedFolder, BoundedSources
from adapterkit.statistics.file import Results
from adapterkit.statistics.job import Batch, CollectionJob, Request
from adapterkit.statistics.ledger import Ledger, fingerprint, open_work
from adapterkit.statistics.model.activations import ActivationStore
from adapterkit.statistics.model.layerwise import run_layerwise
from adapterkit.statistics.model.stored_model import StoredModel
from adapterkit.statistics.model.whole import run_whole
from adapterkit.statistics.sums import COMPONENTS

Progress = Callable[[int, int], None]  # (steps done, of how many)


def open_sources(folder: Folder) -> Sources:
    """The base's files; those of the Hub that come one after another, on bounded disk."""
    return BoundedSources(folder) if isinstance(folder, BoundedFolder) else Sources((folder,), {})


def collect_statistics(
    base: Checkpoint,
    batches: Sequence[Batch],
    *,
    what: Sequence[str] = ("covariance",),
    targets: str | None = None,
    work: Path,
    memory: int | None = None,
    device: str | torch.device = "cpu",
    whole: bool = False,
    compat: str | None = None,
    components: int = COMPONENTS,
    experts: bool = False,
    resume: bool = False,
    progress: Progress = lambda done, total: None,
) -> Results:
    """Statistics of the linear layers of a checkpoint's model while it runs on `batches`.

    `batches`: keyword arguments of the model's forward, each of samples (batch, ...); with
    `labels` (batch, tokens) only tokens whose label is not -100 count, with `attention_mask` only
    those that it lets count. `what`: covariance, mean, pca (the leading `components` principal
    components, centered, exact), gradient (of the model's loss, which needs `labels`; dLoss/dW,
    the mean over the batches). `targets`: as `init --targets`, all linear layers but the output
    if it is None. `work`: a folder for what has to wait, created; see `Results` for its end.
    The model runs one layer at a time: in memory are one layer, one batch's activations, and those
    of `memory` bytes (a quarter of the machine's) of batches that wait, the rest is in `work`.
    `whole`: all of it in memory, with the same results up to rounding. `resume`: layers whose sums
    are in `work` are not summed again; `Refused` if they are of another job.
    `compat="peft"`: the covariance of PEFT's `preprocess_corda`, the mean over the calls of a layer
    of x xᵀ / max(x)², summed over all vectors of the call; `Refused` for batches of several rows.
    `experts`: of the inputs of modules that hold stacks of experts too, under the module's name.

    The model is in eval mode (PEFT collects gradients in training mode, whose dropout makes them
    random), in its checkpoint's dtype, without a cache. Sums as `statistics.sums` says.

    Raises `Refused` before anything runs for models that transformers cannot build, targets that
    are no linear layers, batches that the gradient cannot be computed of; `Failed` for inputs
    that are not finite.
    """
    request = Request(tuple(dict.fromkeys(what)), targets, compat, components, experts)
    request.check()
    with open_sources(base.folder) as sources:
        stored = StoredModel(base, sources, torch.device(device))
        job = CollectionJob(stored, request, batches, whole)
        options = {**vars(request), "targets": job.targets, "whole": job.is_whole}
        open_work(work, fingerprint(base, batches, options), resume)
        ledger = Ledger(work, job)
        with closing(
            ActivationStore(work, quarter_of_memory() if memory is None else memory)
        ) as room:
            run(job, ledger, room, progress)
    return job.results(work, ledger.files)


class Layers:
    """Turns steps done of so many into the steps just done."""

    def __init__(self, progress: Callable[[int], None]):
        self.progress, self.done = progress, None

    def __call__(self, done: int, total: int) -> None:
        if self.done is None:
            getattr(self.progress, "expect", lambda total: None)(total)
            self.done = 0
        self.progress(done - self.done)
        self.done = done


def run(job: CollectionJob, ledger: Ledger, room: ActivationStore, progress: Progress) -> None:
    """Let all batches go through the model, and the ledger have what it wants of it."""
    if job.is_whole:
        run_whole(job, ledger, progress)
    else:
        run_layerwise(job, ledger, room, progress)

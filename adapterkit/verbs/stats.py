"""stats: statistics of what a model's layers see of some data, for what is initialized, quantized
or refitted by them."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from adapterkit.checkpoint.reader import changed
from adapterkit.engines.device import pick_device
from adapterkit.engines.execution import output_file, writes
from adapterkit.errors import Failed, listed
from adapterkit.options import StrPath, files, kinds, parse_size
from adapterkit.plan import Progress
from adapterkit.planning.input_files import identities
from adapterkit.planning.sources import open_model
from adapterkit.receipt import RECEIPT_VERSION, Receipt, public_recipe
from adapterkit.statistics import output
from adapterkit.statistics.collect import collect_statistics
from adapterkit.statistics.file import Results, write_statistics
from adapterkit.statistics.job import WHAT
from adapterkit.statistics.plan import Options, StatisticsPlan, plan_statistics
from adapterkit.statistics.sums import COMPONENTS


@writes(what=kinds(WHAT), out=output_file)
def stats(
    base: StrPath,
    *,
    data: StrPath | Sequence[StrPath],
    out: StrPath,
    what: str | Sequence[str] = ("covariance",),
    samples: int = 256,
    length: int | None = None,
    targets: str | None = None,
    batch: int = 8,
    seed: int = 0,
    whole: bool = False,
    compat: str | None = None,
    components: int = COMPONENTS,
    device: str = "auto",
    memory: str | int | None = None,
    disk_limit: str | int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress = lambda done: None,
) -> Receipt | StatisticsPlan:
    """Collect statistics of what a model's linear layers see of some texts, one layer of the model
    in memory at a time.

    `data`: files. `.txt`: paragraphs with blank lines between them, or else each line is a sample.
    `.jsonl`: each line is one, with `text`; or with `prompt` and `completion`, of which the
    completion's tokens count; or with `messages`, for the tokenizer's chat template, of which the
    assistant's count where the template marks them; or with `input_ids`, and `labels` which are
    -100 where a token does not count. `.parquet`, or a folder of `datasets`: each row is one, of
    these columns. `samples` of them are drawn by `seed`, without replacement; each is cut to
    `length` tokens (default: 512, or the model's positions), to which none is added but the
    tokenizer's own.

    `what`, texts or one with commas: covariance E[x xᵀ], mean E[x], pca (the leading `components`
    principal directions of the centered inputs, with their variances), gradient (dLoss/dW of the
    model's loss, the mean over the batches of `batch` samples). `targets`: `all-linear` (the
    default: all linear layers but the output), ends of modules' names with commas between, or a
    regex. `whole`: run the whole model in memory, to the same numbers within rounding.
    `compat="peft"`: the covariance as PEFT's CorDA computes it, of inputs divided by their largest.
    `memory`: bytes of activations in memory, beyond which they go to disk (default: a quarter of
    the machine's).

    `out` is one safetensors file that appears whole or not at all, here or in one commit to the Hub
    (hf://org/name[@branch]:path/file.safetensors), where `disk_limit` bounds what lies on this
    machine's disk meanwhile; its metadata say what the job was, and so does the receipt's `data`.
    `progress` is called with the layers just done. Raises `Refused` before anything is written;
    `Failed` for inputs that are not finite.
    """
    options = Options(tuple(what), samples, length, targets, batch, seed, whole, compat, components)
    folder = open_model(base)
    output.check_output(out, folder)
    budget = parse_size("memory", memory) if memory else None
    plan = plan_statistics(folder, files("data", data), options, _device(device), budget)
    plan = output.placed(plan, out, disk_limit)
    if dry_run:
        return plan
    with output.open_target(out, folder) as target:
        return _Job(plan, progress).run(target, resume=resume, overwrite=overwrite)


def _device(name: str) -> torch.device:
    """`auto` is a GPU where there is one: unlike a merge, a forward pass waits for arithmetic."""
    return pick_device("cuda" if name == "auto" and torch.cuda.is_available() else name)


@dataclass(frozen=True)
class _Job:
    """A plan that is carried out."""

    plan: StatisticsPlan
    progress: Progress

    def run(self, target: output.Target, *, resume: bool, overwrite: bool) -> Receipt:
        began, recipe = time.monotonic(), self.plan.recipe()
        needed = self.plan.totals()["disk_needed"]
        file = output.write(
            target, recipe, self._fill, needed=needed, resume=resume, overwrite=overwrite
        )
        seconds = time.monotonic() - began
        data = {
            "adapterkit": RECEIPT_VERSION,
            **file.metadata,
            "files": {target.made.name: {"size": file.size, "sha256": file.sha256}},
            "totals": self.plan.totals() | {"tensors": file.tensors, "bytes_written": file.size},
            "keys": {},
            "parameters": {},
            "timings": {"seconds": round(seconds, 3)},
            **({"pushed": file.pushed} if file.pushed else {}),
        }
        return Receipt(target.out, data, finished_before=not file.is_new)

    def _fill(self, file: Path, work: Path, goes_on: bool) -> None:
        plan, options, recipe = self.plan, self.plan.options, self.plan.recipe()
        results = collect_statistics(
            plan.base,
            plan.batches,
            what=options.what,
            targets=options.targets,
            work=work,
            memory=plan.memory,
            device=plan.device,
            whole=options.whole,
            compat=options.compat,
            components=options.components,
            resume=goes_on,
            progress=_Layers(self.progress),
        )
        _check_unchanged(plan)
        notes = list(dict.fromkeys([*plan.notes, *results.notes, *_unseen(plan, results)]))
        settings = {
            "fingerprint": output.fingerprint(recipe),
            "recipe": public_recipe(recipe),
            "notes": notes,
        }
        write_statistics(file, replace(results, settings=results.settings | settings))


def _check_unchanged(plan: StatisticsPlan) -> None:
    """`Unrecoverable` where a file of the model is not the one that was planned with."""
    now = identities((plan.base.folder,), plan.headers)
    for (_, name), before, after in ((key, plan.identities[key], now[key]) for key in now):
        if before != after:
            raise changed(name)


def _unseen(plan: StatisticsPlan, results: Results) -> list[str]:
    """A note on the modules without statistics; `Failed` where no module has any."""
    unseen = [name for name in plan.shapes if name not in {*results.modules}]
    if len(unseen) == len(plan.shapes):
        raise Failed(
            f"none of {len(unseen)} layers saw a token that counts",
            expected="layers that the model runs",
            where="--targets",
            hint="name other --targets",
        )
    return [f"no statistics of {listed(unseen)}: they saw no token that counts"] if unseen else []


class _Layers:
    """Turns steps done of so many into the steps just done."""

    def __init__(self, progress: Progress):
        self.progress, self.done = progress, None

    def __call__(self, done: int, total: int) -> None:
        if self.done is None:
            getattr(self.progress, "expect", lambda total: None)(total)
            self.done = 0
        self.progress(done - self.done)
        self.done = done

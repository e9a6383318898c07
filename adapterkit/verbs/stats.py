"""stats: statistics of what a model's layers see of some data, for what is initialized, quantized
or refitted by them."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from adapterkit.engines.execution import output_file, writes
from adapterkit.engines.run_options import RunOptions
from adapterkit.errors import Failed, Refused, listed
from adapterkit.options import Executor, StrPath, files, kinds, parse_size
from adapterkit.plan import Progress
from adapterkit.planning.sources import open_model
from adapterkit.receipt import RECEIPT_VERSION, Receipt, fingerprint_of, public_recipe
from adapterkit.statistics import output
from adapterkit.statistics.collect import Layers, collect_statistics
from adapterkit.statistics.file import Results, write_statistics
from adapterkit.statistics.job import WHAT
from adapterkit.statistics.plan import (
    Options,
    StatisticsPlan,
    check_unchanged,
    device_of,
    plan_statistics,
)
from adapterkit.statistics.ranks import Collect
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
    engine: str | Executor = "local",
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
    `compat="peft"`: the covariance as PEFT's CorDA computes it, of inputs divided by their largest,
    one sample after the other whatever `batch` says.
    `memory`: bytes of activations in memory, beyond which they go to disk (default: a quarter of
    the machine's).

    `out` is one safetensors file that appears whole or not at all, here or in one commit to the Hub
    (hf://org/name[@branch]:path/file.safetensors), where `disk_limit` bounds what lies on this
    machine's disk meanwhile; its metadata say what the job was, and so does the receipt's `data`.
    `engine`: local; several processes share the sums by `write_plan`. `progress` is called with the
    layers just done. Raises `Refused` before anything is written; `Failed` for inputs that are not
    finite.
    """
    if engine == "ray":
        raise Refused(
            "stats with --engine ray",
            expected="one process, or several that share the sums",
            where="options",
            hint="give --plan, and start `adapterkit run` on each machine",
        )
    options = Options(tuple(what), samples, length, targets, batch, seed, whole, compat, components)
    folder = open_model(base)
    output.check_output(out, folder)
    budget = parse_size("memory", memory) if memory else None
    by_plan = isinstance(engine, Executor)
    place = torch.device("cpu") if by_plan else device_of(device)  # each rank decides for itself
    plan = plan_statistics(folder, files("data", data), options, place, budget)
    plan = output.placed(plan, out, disk_limit)
    if dry_run:
        output.check_place(plan, out, folder, resume=resume, overwrite=overwrite)
        return plan

    def write(collect: Collect, *, began: float, resume: bool, overwrite: bool) -> Receipt:
        with output.open_target(out, folder) as target:
            return _Job(plan, collect, began).run(target, resume=resume, overwrite=overwrite)

    if by_plan:
        how = RunOptions(out, "none", device, memory, engine, resume, overwrite, dry_run, progress)
        return engine(plan, how, write)
    collect = partial(_collected, plan, progress)
    return write(collect, began=time.monotonic(), resume=resume, overwrite=overwrite)


@dataclass(frozen=True)
class _Job:
    """A plan that is carried out."""

    plan: StatisticsPlan
    collect: Collect
    began: float  # as time.monotonic has it

    def run(self, target: output.Target, *, resume: bool, overwrite: bool) -> Receipt:
        recipe = self.plan.recipe()
        needed = self.plan.totals()["disk_needed"]
        file = output.write(
            target, recipe, self._fill, needed=needed, resume=resume, overwrite=overwrite
        )
        seconds = time.monotonic() - self.began
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
        plan, recipe = self.plan, self.plan.recipe()
        results = self.collect(work, goes_on)
        check_unchanged(plan)
        notes = list(dict.fromkeys([*plan.notes, *results.notes, *_unseen(plan, results)]))
        settings = {
            "fingerprint": fingerprint_of(recipe),
            "recipe": public_recipe(recipe),
            "notes": notes,
        }
        write_statistics(file, replace(results, settings=results.settings | settings))


def _collected(plan: StatisticsPlan, progress: Progress, work: Path, goes_on: bool) -> Results:
    """The statistics, collected by this process."""
    options = plan.options
    return collect_statistics(
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
        progress=Layers(progress),
    )


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

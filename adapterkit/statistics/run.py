"""stats carried out: the file of statistics, collected by this process or joined from ranks'."""

import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from adapterkit.errors import Failed, Refused, listed
from adapterkit.options import Progress, files, parse_size
from adapterkit.plan import Plan
from adapterkit.planning.inputs.sources import open_model
from adapterkit.receipt import RECEIPT_VERSION, Receipt, fingerprint_of, public_recipe
from adapterkit.statistics import output
from adapterkit.statistics.collect import Layers, collect_statistics
from adapterkit.statistics.file import Results, write_statistics
from adapterkit.statistics.plan import (
    Collection,
    Options,
    check_unchanged,
    device_of,
    plan_statistics,
)
from adapterkit.statistics.ranks import Collect
from adapterkit.verbs.stats import Stats


def plan_stats(stats: Stats) -> Plan:
    """Everything the collection will do, or `Refused`."""
    if stats.engine == "ray":
        raise Refused(
            "stats with --engine ray",
            expected="one process, or several that share the sums",
            where="options",
            hint="give --plan, and start `adapterkit run` on each machine",
        )
    options = Options(
        what=tuple(stats.what),
        samples=stats.samples,
        length=stats.length,
        targets=stats.targets,
        batch=stats.batch,
        seed=stats.seed,
        whole=stats.whole,
        compat=stats.compat,
        components=stats.components,
    )
    folder = open_model(stats.base)
    output.check_output(stats.out, folder)
    memory = parse_size(stats.memory) if stats.memory else None
    plan = replace(plan_statistics(folder, files(stats.data), options), memory=memory)
    return output.placed(plan, stats.out, stats.disk_limit)


def carry_out(plan: Plan, stats: Stats) -> Receipt | Plan:
    """Write the file, or with `dry_run` look whether it could be written."""
    device, how = device_of(stats.device), {"resume": stats.resume, "overwrite": stats.overwrite}
    if stats.dry_run:
        output.check_place(plan, stats.out, plan.folders[0], **how)
        return plan
    collect = partial(_collected, plan, device, stats.progress)
    return write(plan, stats, collect, began=time.monotonic(), **how)


def writer(plan: Plan, stats: Stats) -> partial[Receipt]:
    """What writes the file of ranks' statistics."""
    return partial(write, plan, stats)


def write(
    plan: Plan,
    stats: Stats,
    collect: Collect,
    *,
    began: float,
    resume: bool,
    overwrite: bool,
) -> Receipt:
    """Write the file of what `collect` gives."""
    with output.open_target(stats.out, plan.folders[0]) as target:
        return _Job(plan, collect, began).run(target, resume=resume, overwrite=overwrite)


@dataclass(frozen=True)
class _Job:
    """A plan that is carried out."""

    plan: Plan
    collect: Collect
    began: float  # as time.monotonic has it

    def run(self, target: output.StatisticsTarget, *, resume: bool, overwrite: bool) -> Receipt:
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


def _collected(
    plan: Plan, device: torch.device, progress: Progress, work: Path, goes_on: bool
) -> Results:
    """The statistics, collected by this process."""
    collection = Collection.of(plan)
    options = collection.options
    return collect_statistics(
        collection.base,
        collection.batches,
        what=options.what,
        targets=options.targets,
        work=work,
        memory=plan.budget,
        device=device,
        whole=options.whole,
        compat=options.compat,
        components=options.components,
        resume=goes_on,
        progress=Layers(progress),
    )


def _unseen(plan: Plan, results: Results) -> list[str]:
    """A note on the modules without statistics; `Failed` where no module has any."""
    shapes = Collection.of(plan).shapes
    unseen = [name for name in shapes if name not in {*results.modules}]
    if len(unseen) == len(shapes):
        raise Failed(
            f"none of {len(unseen)} layers saw a token that counts",
            expected="layers that the model runs",
            where="--targets",
            hint="name other --targets",
        )
    return [f"no statistics of {listed(unseen)}: they saw no token that counts"] if unseen else []

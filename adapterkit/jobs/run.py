"""run: one process's share of a plan file, or the steps of a pipeline."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adapterkit.engines.ranks import WAIT, Outcome
from adapterkit.errors import Refused
from adapterkit.jobs.launcher import rank_of
from adapterkit.jobs.pipeline import run_pipeline
from adapterkit.jobs.plan_file import PlanFile, again, read_plan
from adapterkit.jobs.verbs import executors_of
from adapterkit.options import StrPath, checked, text
from adapterkit.plan import Progress
from adapterkit.receipt import Receipt


@checked(rank=text)
def run(
    file: StrPath,
    *,
    rank: str = "auto",
    device: str | None = None,
    workers: int | None = None,
    wait: float = WAIT,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress = lambda done: None,
) -> Outcome | dict[str, Any]:
    """Make the share of a plan file's output that one of several processes has, and what others
    leave; what was done. Of a `.toml` file carry out the steps of the pipeline; the report of
    `jobs.pipeline.run_pipeline`.

    `rank`: `I/N`, I from 0, or `auto`: as Slurm, torchrun, MPI or Kubernetes say, else 0/1.
    `device` and `workers` (threads) in place of the plan's. `wait`: seconds for files that others
    make and that this rank's need; then `Waiting`. Killed, run again the same: what is finished
    stays. `overwrite`, of a pipeline: replace outputs that it did not write. Raises `Refused` where
    the job is not that of the plan file any more; `Failed` after.
    """
    given = {"rank": rank != "auto", "workers": workers is not None, "wait": wait != WAIT}
    if Path(file).suffix == ".toml":
        _refuse([name for name, is_given in given.items() if is_given], "a pipeline")
        options = {"device": device, "overwrite": overwrite, "dry_run": dry_run}
        return run_pipeline(file, **options, progress=progress)
    _refuse(["overwrite"] if overwrite else [], "a plan file")
    return run_rank(
        read_plan(file),
        *rank_of(rank),
        device=device,
        workers=workers,
        wait=wait,
        dry_run=dry_run,
        progress=progress,
    )


def _refuse(names: list[str], what: str) -> None:
    if names:
        options = ", ".join(f"--{name}" for name in names)
        raise Refused(
            f"{options} does not apply to {what}",
            expected="--rank, --workers and --wait with a plan file, --overwrite with a pipeline",
            where="options",
            hint=f"remove {options}",
        )


def run_rank(
    plan_file: PlanFile,
    rank: int,
    ranks: int,
    *,
    only: Sequence[str] | None = None,
    device: str | None = None,
    workers: int | None = None,
    wait: float = WAIT,
    dry_run: bool = False,
    progress: Progress = lambda done: None,
) -> Outcome:
    """`run` of a plan file that was read; with `only` exactly these files."""
    make = executors_of(plan_file.call.verb.__name__).rank
    executor = make(plan_file.job, rank, ranks, device, workers, wait, dry_run, only)
    with again():
        # resume: an output that is one file may be there already
        done = plan_file.call.run(engine=executor, resume=True, progress=progress)
    if isinstance(done, Receipt):
        return Outcome(rank, ranks, [], finished=True)
    assert executor.outcome is not None
    return executor.outcome

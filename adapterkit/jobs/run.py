"""run: one process's share of a plan file."""

from collections.abc import Sequence

from adapterkit.engines.ranks import WAIT, Outcome, Rank
from adapterkit.jobs.plan_file import PlanFile, again, read_plan
from adapterkit.jobs.rank import rank_of
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
    dry_run: bool = False,
    progress: Progress = lambda done: None,
) -> Outcome:
    """Make the share of a plan file's output that one of several processes has, and what others
    leave; what was done.

    `rank`: `I/N`, I from 0, or `auto`: as Slurm, torchrun, MPI or Kubernetes say, else 0/1.
    `device` and `workers` (threads) in place of the plan's. `wait`: seconds for files that others
    make and that this rank's need; then `Waiting`. Killed, run again the same: what is finished
    stays. Raises `Refused` where the job is not that of the plan file any more; `Failed` after.
    """
    return run_rank(
        read_plan(file),
        *rank_of(rank),
        device=device,
        workers=workers,
        wait=wait,
        dry_run=dry_run,
        progress=progress,
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
    executor = Rank(plan_file.job, rank, ranks, device, workers, wait, dry_run, only)
    with again():
        # resume: an output that is one file may be there already
        done = plan_file.call.run(engine=executor, resume=True, progress=progress)
    if isinstance(done, Receipt):
        return Outcome(rank, ranks, [], finished=True)
    assert executor.outcome is not None
    return executor.outcome

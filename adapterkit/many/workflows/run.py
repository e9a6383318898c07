"""run: carry out one process's share of a plan file, the steps of a pipeline, or a recipe."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit.core.errors import Refused, as_usage
from adapterkit.core.options import (
    COUNT,
    DEVICE,
    FILE,
    FLAG,
    PROGRESS,
    TEXT,
    Progress,
    StrPath,
    argument,
    choice,
    flag_of,
    no_progress,
    number,
    option,
    record,
)
from adapterkit.core.records import Json
from adapterkit.core.shared_options import OUTPUT_MODEL, WAIT
from adapterkit.core.verb import Verb, function_of
from adapterkit.doors import ENGINES

if TYPE_CHECKING:
    from adapterkit.core.merge.verb import Merge
    from adapterkit.core.plan import Plan
    from adapterkit.core.receipt import Receipt
    from adapterkit.many.workers.worker import Outcome

OF_PLAN_FILES, OF_RECIPES = ("worker", "workers", "wait"), ("out",)
OF_PIPELINES = ("overwrite", "engine", "allow_push")

RECIPES = (".yml", ".yaml")


@record
class Run(Verb["Outcome | Json | Receipt | Plan"]):
    """Make one worker's share of a plan file's output, and files that other workers leave; return a
    summary. For a `.toml` file, carry out the steps of the pipeline and return their report. For a
    `.yml` or `.yaml` file, a recipe of mergekit whose inputs are one base with adapters, merge
    these into `out` and return what `merge` returns.

    `worker`: `I/N`, I from 0, or `auto`: from Slurm, torchrun, MPI or Kubernetes, else 0/1.
    `device` and `workers` (threads) override the plan's. `wait`: seconds to wait for other workers'
    files that this worker needs, before `Waiting`. If it is killed, the same call resumes. For a
    pipeline, `overwrite` replaces outputs that it did not write, `engine` runs its steps, and
    without `allow_push` nothing is uploaded, whatever the file requests. For a recipe, `overwrite`
    replaces an older output. Raises `Refused` if the job no longer matches the plan file, or
    `Failed` later.
    """

    command = """Run a plan file, a pipeline of steps, or a recipe of mergekit.

    A command with --plan writes a plan file instead of its output. Run that file on each machine of
    a shared file system. Each worker writes its share of the output files, and then files that no
    other worker has begun. If a worker dies, others or a restart finish its files. Afterwards
    `adapterkit finish` checks and publishes the output.

    A pipeline is a .toml file of steps, each a command. All steps are planned before the first one
    runs; a step whose output exists for the same inputs and options is skipped. The exit status is
    1 if any step was refused.

    A recipe is a .yml file of mergekit whose inputs are one base with adapters. Its gradients (by
    layer) and filters (by name) become weights and densities of modules. Unsupported settings are
    refused by name. Experimental.

    \b
    Example:
      adapterkit run steps.toml --dry-run
      adapterkit run recipe.yml --out merged
      adapterkit merge ./base ./adapter --out merged --plan merged.plan.json
      adapterkit run merged.plan.json --worker 0/2
      srun adapterkit run merged.plan.json
    """

    file: StrPath = argument(kw_only=False, check=FILE, metavar="FILE")
    worker: str = option(
        default="auto",
        check=TEXT,
        metavar="auto|I/N",
        help="Number of this process among N, from 0; auto takes it from Slurm, torchrun, MPI or "
        "Kubernetes.",
    )
    device: str | None = option(
        default=None,
        check=DEVICE,
        metavar="auto|cpu|cuda[:i]",
        help="Device that computes (default: the plan's).",
    )
    workers: int | None = option(
        default=None, check=COUNT, help="Number of threads (default: one per core)."
    )
    wait: float = option(
        default=WAIT,
        check=number("0 or more seconds", lambda value: value >= 0),
        help="Seconds to wait for files of other workers that this one needs; afterwards the exit "
        "status is 3.",
    )
    overwrite: bool = option(
        default=False,
        check=FLAG,
        help="Replace outputs that this pipeline did not write, or an older output of a recipe.",
    )
    allow_push: bool = option(
        default=False,
        check=FLAG,
        help="Allow a pipeline to upload outputs (hf://, push).",
        section="Pipelines",
    )
    engine: str | None = option(
        default=None,
        check=choice(tuple(ENGINES)),
        help="Run the steps of a pipeline on this machine, or on a Ray cluster.",
        section="Pipelines",
    )
    out: StrPath | None = option(
        default=None,
        check=OUTPUT_MODEL,
        metavar="DIR|FILE|hf://ORG/NAME[:FILE]",
        help="Output of a recipe, as in merge.",
        section="Recipes of mergekit",
        tier="experimental",
    )
    dry_run: bool = option(
        default=False,
        check=FLAG,
        help="Print the files of this worker, or the plans of all steps, and stop.",
    )
    progress: Progress = option(default=no_progress, check=PROGRESS)

    def run(self) -> "Outcome | Json | Receipt | Plan":
        from adapterkit.many.workflows.workflow import run_pipeline

        if Path(self.file).suffix in RECIPES:
            self._refuse((*OF_PLAN_FILES, "engine", "allow_push"), "a recipe")
            with as_usage(False):  # a wrong value in the file
                return self.merge().run()
        if Path(self.file).suffix == ".toml":
            self._refuse((*OF_PLAN_FILES, *OF_RECIPES), "a pipeline")
            return run_pipeline(
                self.file,
                device=self.device,
                engine=self.engine,
                overwrite=self.overwrite,
                allow_push=self.allow_push,
                dry_run=self.dry_run,
                progress=self.progress,
            )
        self._refuse((*OF_PIPELINES, *OF_RECIPES), "a plan file")
        return self.make_share()

    def make_share(self) -> "Outcome":
        """Make this process's share of a plan file's output."""
        from adapterkit.core.engine.execution import check_out
        from adapterkit.many.workers.launcher import worker_of
        from adapterkit.many.workers.worker import make_share
        from adapterkit.many.workflows.plan_file import again, read_plan

        plan_file, numbers = read_plan(self.file), worker_of(self.worker)
        verb = replace(plan_file.verb, resume=True, progress=self.progress)
        with again(verb):
            plan = verb.plan()
            check_out(plan, verb)
            return make_share(
                plan,
                plan_file.job,
                verb,
                *numbers,
                device=self.device,
                workers=self.workers,
                wait=self.wait,
                dry_run=self.dry_run,
            )

    def merge(self) -> "Merge":
        """The merge that a recipe describes."""
        from adapterkit.many.workflows.recipe import merge_of

        running = {
            name: getattr(self, name) for name in ("out", "overwrite", "dry_run", "progress")
        }
        return merge_of(Path(self.file), device=self.device or "auto", **running)

    def _refuse(self, names: tuple[str, ...], what: str) -> None:
        """`Refused` if options are given that do not apply."""
        given = [flag_of(name) for name in names if getattr(self, name) != getattr(Run, name)]
        if given:
            options = ", ".join(given)
            with as_usage():
                raise Refused(
                    f"{options} does not apply to {what}",
                    expected="--worker, --workers and --wait with a plan file, --engine and "
                    "--allow-push with a pipeline, --overwrite with a pipeline or a recipe, "
                    "--out with a recipe",
                    where="options",
                    hint=f"remove {options}",
                    code="AK102",
                )


run = function_of(Run)

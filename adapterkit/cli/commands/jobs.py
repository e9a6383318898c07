"""Commands on plan files and pipelines: run, finish."""

from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from adapterkit.cli.batch import run_steps
from adapterkit.cli.exits import WAITING, fail
from adapterkit.cli.options import json_option, push_option, quiet_option, verify_option
from adapterkit.cli.output import ProgressBar, print_json, run_to_receipt

if TYPE_CHECKING:
    from adapterkit.engines.ranks import Outcome


@click.command()
@click.argument("file", type=click.Path(), metavar="FILE")
@click.option(
    "--rank",
    default="auto",
    show_default=True,
    metavar="auto|I/N",
    help="Which of N processes this is, from 0; auto: as Slurm, torchrun, MPI or Kubernetes say.",
)
@click.option(
    "--device", metavar="auto|cpu|cuda[:i]", help="Where to compute (default: as in the plan)."
)
@click.option("--workers", type=int, help="Threads (default: one for each core).")
@click.option(
    "--wait",
    type=float,
    default=600.0,
    show_default=True,
    help="Seconds to wait for files of other ranks, where this one's need them; then exit status "
    "3.",
)
@click.option("--overwrite", is_flag=True, help="Replace outputs that this pipeline did not write.")
@click.option(
    "--dry-run", is_flag=True, help="Print the files of this rank, or plan all steps, and stop."
)
@json_option
@quiet_option
@click.pass_context
def run(ctx: click.Context, file: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """Run a plan file, one worker's share of it, or a pipeline.

    Any writing command with --plan writes a plan file (what to compute) instead of its output.
    Start this command on each machine of a shared file system: each worker writes its share of the
    output files, then files that no other has begun. If a worker dies, others or a restart finish
    its files. `adapterkit finish` then checks and publishes the output.

    A pipeline is a .toml file of steps, each a command. All steps are planned before the first one
    runs; a step whose output exists for the same inputs and options is skipped. The exit status is
    1 if any step was refused.

    \b
    Example:
      adapterkit run steps.toml --dry-run
      adapterkit merge ./base ./adapter --out merged --plan merged.plan.json
      adapterkit run merged.plan.json --rank 0/2
      srun adapterkit run merged.plan.json
    """
    if file.endswith(".toml"):
        names = ("rank", "workers", "wait")
        given = [n for n in names if ctx.get_parameter_source(n) is not ParameterSource.DEFAULT]
        if given:
            raise click.UsageError(
                f"--{given[0]} applies to plan files only; remove it for a pipeline"
            )
        steps = {name: value for name, value in options.items() if name not in names}
        ctx.exit(run_steps(file, as_json=as_json, quiet=quiet, **steps))
    from adapterkit.engines.ranks import Outcome
    from adapterkit.errors import Waiting
    from adapterkit.jobs.run import run as verb

    try:
        with ProgressBar(quiet or options["dry_run"]) as bar:
            outcome = verb(file, progress=bar, **options)
    except Waiting as error:
        fail(error, WAITING)
    assert isinstance(outcome, Outcome)
    if as_json:
        print_json(vars(outcome))
    elif options["dry_run"]:
        for name in outcome.share:
            click.echo(name)
    elif not quiet:
        _print(outcome)


def _print(outcome: "Outcome") -> None:
    others = len({*outcome.made} - {*outcome.share})
    text = f"rank {outcome.rank}/{outcome.ranks}: wrote {len(outcome.made)} files"
    text += f", {others} of them for other ranks" if others else ""
    if outcome.finished:
        text += "; the output is already published"
    elif outcome.left:
        text += f"; other ranks are writing {len(outcome.left)} more"
    else:
        text += "; all files are written, next: adapterkit finish"
    click.echo(text, err=True)


@click.command()
@click.argument("file", type=click.Path(), metavar="FILE")
@verify_option
@push_option
@json_option
@quiet_option
def finish(file: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """Publish the output of a plan file once its files are made.

    Refused while some are missing, with their names. The output and its receipt are those of the
    command itself.

    \b
    Example:
      adapterkit finish merged.plan.json
      adapterkit finish merged.plan.json --verify --push me/merged
    """
    from adapterkit.jobs.finish import finish as verb

    run_to_receipt(verb, file, as_json=as_json, quiet=quiet, **options)

"""Commands that only read: inspect, diff, verify."""

from typing import Any

import click

from adapterkit.cli.completion import Source
from adapterkit.cli.options import base_option, json_option, quiet_option, statistics_option
from adapterkit.cli.output import ProgressBar, print_diff, print_json, print_verified


@click.command()
@click.argument("path", type=Source())
@base_option("The adapter's base: norms are also given relative to its weights' norms.")
@click.option(
    "--download",
    is_flag=True,
    help="Read weights on the Hub too (default: only headers and JSON).",
)
@click.option(
    "--headers",
    is_flag=True,
    help="Read only headers and JSON: no norms and effective ranks of an adapter, and of a base "
    "no search for missing parameters, for which transformers builds the model without data.",
)
@click.option(
    "--plot",
    type=click.Path(),
    metavar="FILE.png",
    help="Plot the norms as a heatmap, layers by modules.",
)
@json_option
@click.pass_context
def inspect(ctx: click.Context, path: str, as_json: bool, **options: Any) -> None:
    """Show what a checkpoint or adapter holds, and its problems.

    Of a base and of sources on the Hub, headers and JSON are read; of a local adapter also the
    factors, for norms and effective ranks, unless --headers is given. The exit status is 1 if a
    file is missing or cannot be read, else 0, whatever the problems; a path without anything to
    inspect is refused.

    \b
    Example:
      adapterkit inspect ./my-adapter --base ./base --plot norms.png
      adapterkit inspect meta-llama/Llama-3.1-8B --json
    """
    from adapterkit.reports.tables import inspect_table
    from adapterkit.verbs.inspect import inspect as verb

    with ProgressBar(False) as bar:
        result = verb(path, progress=bar, **options)
    if as_json:
        print_json(result)
    else:
        click.echo(inspect_table(result))
    ctx.exit(0 if result["readable"] else 1)


@click.command()
@click.argument("a", type=Source())
@click.argument("b", type=Source())
@click.option(
    "--tolerance",
    type=float,
    default=0.0,
    show_default=True,
    help="Largest relative error of tensors that count as the same.",
)
@click.option(
    "--rank-for-energy",
    type=float,
    metavar="SHARE",
    help="Suggest the rank that keeps this energy share of each difference "
    "(default: 0.9, for adapters 0.99; 0: none).",
)
@json_option
@click.option("--quiet", is_flag=True, help="Show no progress and no table: only the exit status.")
@click.pass_context
def diff(ctx: click.Context, a: str, b: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """Compare two checkpoints, adapters or .safetensors files.

    Checkpoints are compared by key, however they are sharded; a copy rounded to another dtype is
    the same. Adapters are compared by their deltas scale·b@a, whatever their ranks and alphas.

    Columns: relative ‖A−B‖/‖A‖, largest difference, cosine, share of elements that differ, and the
    rank that holds 90 % of the squared singular values of the difference (~: at most that, from a
    sketch). Differing config settings come last; those that change the arithmetic count as a
    difference.

    Exit status: 0 the same; 1 different by more than the tolerance; 2 wrong usage, refused or
    failed.

    \b
    Example:
      adapterkit diff ./base ./tuned
      adapterkit diff ./adapter ./resized --tolerance 1e-3
    """
    from adapterkit.reports.tables import diff_table
    from adapterkit.verbs.diff import diff as verb

    if quiet and not as_json:
        options["rank_for_energy"] = 0.0
    with ProgressBar(quiet) as bar:
        result = verb(a, b, progress=bar, **options)
    if as_json:
        print_json(result)
    elif not quiet:
        print_diff(result, diff_table(result))
    ctx.exit(0 if result["same"] else 1)


@click.command()
@click.argument("folder", type=Source(), metavar="DIR")
@base_option("Base of a merge: recompute rows of each changed tensor in float64.")
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    type=Source(),
    metavar="ADAPTER",
    help="An adapter of the merge; repeat for several, in the merge's order.",
)
@statistics_option("Statistics of a merge that took some.")
@json_option
@quiet_option
def verify(folder: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """Check an output against its receipt.

    Every hash, size and key is checked; with the inputs of a merge the arithmetic too.

    \b
    Example:
      adapterkit verify merged
      adapterkit verify merged --base ./base --adapter ./my-adapter
    """
    from adapterkit.verbs.verify import verify as verb

    with ProgressBar(quiet) as bar:
        result = verb(folder, progress=bar, **options)
    if as_json:
        print_json(result)
    elif not quiet:
        print_verified(result)

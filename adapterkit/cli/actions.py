"""Commands that call a verb and print its result in their own way."""

from collections.abc import Callable
from shutil import get_terminal_size
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from adapterkit.cli.output import ProgressBar, print_diff, print_json, print_verified, run_verb
from adapterkit.cli.parameters import json_option, quiet_option
from adapterkit.cli.signals import WAITING, fail
from adapterkit.core.commands import command
from adapterkit.core.errors import advised
from adapterkit.core.records import Json
from adapterkit.core.verb import Verb, function_of

if TYPE_CHECKING:
    from adapterkit.many.workers.worker import Outcome

QUIET_DIFF = click.Option(
    ["-q", "--quiet"], is_flag=True, help="Show no progress and no table: only the exit status."
)
CONVERT_OPTIONS = [
    click.Option(
        ["--detect"], is_flag=True, help="Print the format and contents of SRC, and stop."
    ),
    click.Option(
        ["--list", "listing"], is_flag=True, help="Print what each format can store, and stop."
    ),
    click.Option(
        ["--from-list"],
        type=click.Path(allow_dash=True),
        metavar="FILE",
        help="Convert every source that this file lists, one per line (-: standard input).",
    ),
    click.Option(
        ["--out-pattern"],
        metavar="PATTERN",
        help="Output paths of --from-list; {name} is the source's name and {parent} its folder's.",
    ),
]


def reading(
    show: Callable[[Json], object], is_fine: Callable[[Json], bool] = lambda result: True
) -> Callable[..., None]:
    """Call a verb that reads, and print its result, as JSON or with `show`; the exit status is 1
    unless the result `is_fine`."""

    def action(
        verb: type[Verb], *sources: Any, as_json: bool, quiet: bool = False, **options: Any
    ) -> None:
        with ProgressBar(quiet) as bar:
            result: Any = function_of(verb)(*sources, progress=bar, **options)
        if as_json:
            print_json(result)
        elif not quiet:
            show(result)
        if not is_fine(result):
            click.get_current_context().exit(1)

    return action


def inspect(verb: type[Verb], paths: Any, modules: bool, **options: Any) -> None:
    """Print the contents of sources; the exit status is 1 if a file cannot be read."""

    def show(result: Json) -> None:
        from adapterkit.verbs.look.tables import adapters_table, inspect_table

        if result["kind"] == "adapters":
            click.echo(adapters_table(result))
        else:
            click.echo(inspect_table(result, modules, get_terminal_size().columns))

    reading(show, lambda result: result["readable"])(verb, paths, **options)


def diff(verb: type[Verb], *sources: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """Print the differences of two sources; the exit status is 1 if there are any."""

    def show(result: Json) -> None:
        from adapterkit.verbs.look.tables import diff_table

        print_diff(result, diff_table(result))

    if quiet and not as_json:
        options["rank_for_energy"] = 0.0
    action = reading(show, lambda result: result["same"])
    action(verb, *sources, as_json=as_json, quiet=quiet, **options)


def report(verb: type[Verb], adapters: Any, **options: Any) -> None:
    """Write the page, and print its advice or its numbers."""

    def show(result: Json) -> None:
        advice = result["advice"]
        click.echo(f"{options['out']}: {advice['reason']}")
        if advice["command"]:
            click.echo(f"next: {advice['command']}")

    reading(show)(verb, adapters, **options)


def fit(
    verb: type[Verb], base: str, adapters: Any, as_json: bool, quiet: bool, **options: Any
) -> None:
    """Fit weights, and print the held-out losses, the files written and the reasons."""
    unit = "batches" if options["score"] is None else "evaluations"
    with ProgressBar(quiet or options["dry_run"], unit) as bar:
        # not the bar itself: how many there are to come is not known
        result = function_of(verb)(base, adapters, progress=bar.__call__, **options)
    if as_json:
        print_json(result)
    elif not quiet:
        from adapterkit.verbs.look.tables import fit_table

        click.echo("\n".join(fit_table(result)))


def score(verb: type[Verb], models: Any, as_json: bool, quiet: bool, **options: Any) -> None:
    """Measure models, and print a table of their losses."""
    with ProgressBar(quiet, "layers") as bar:
        result = function_of(verb)(models, progress=bar, **options)
    if as_json:
        print_json(result)
    elif not quiet:
        from adapterkit.verbs.look.tables import score_table

        click.echo("\n".join(score_table(result)))


def check(verb: type[Verb], adapter: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """Print an engine's treatment of an adapter; the exit status is 1 unless it loads all of it."""
    result = function_of(verb)(adapter, **options)
    if as_json:
        print_json(result)
    elif not quiet:
        for row in result["findings"]:
            expected = f"\n  expected: {row['expected']}" if row["expected"] else ""
            click.echo(f"- {row['verdict']}: {row['problem']}{expected}\n  {advised(row)}")
        takes = f"takes all {result['modules']} modules" if result["takes"] else "does not take it"
        click.echo(f"{result['engine']} {result['version']} {takes}")
    click.get_current_context().exit(0 if result["takes"] else 1)


def compare(verb: type[Verb], *sources: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """Print what a server serves; the exit status is 1 unless it is the adapter, or the model."""
    with ProgressBar(quiet, "layers") as bar:
        # not the bar itself: how many there are to come is not known
        result: Any = function_of(verb)(*sources, progress=bar.__call__, **options)
    if as_json:
        print_json(result)
    elif not quiet:
        from adapterkit.verbs.score.compare import compare_lines

        click.echo("\n".join(compare_lines(result)))
    click.get_current_context().exit(0 if result["same"] else 1)


def _show_findings(result: Json) -> None:
    for row in result["findings"]:
        click.echo(f"- {row['problem']}\n  evidence: {row['evidence']}\n  {advised(row)}")
    click.echo(f"found: {len(result['findings']) or 'nothing'}")


def _show_same(result: Json) -> None:
    click.echo(f"{result['files']} files are the same bytes: {result['command']}")


def run(verb: type[Verb], file: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """Run a worker of a plan file, the steps of a pipeline or a recipe, and print a summary."""
    from adapterkit.many.workflows.run import RECIPES

    ctx = click.get_current_context()
    if file.endswith(RECIPES):
        run_verb(verb, file, as_json=as_json, quiet=quiet, **options)
        return
    if file.endswith(".toml"):
        names = ("worker", "workers", "wait", "out")
        given = [n for n in names if ctx.get_parameter_source(n) is not ParameterSource.DEFAULT]
        if given:
            raise click.UsageError(f"--{given[0]} does not apply to a pipeline; remove it")
        steps = {name: value for name, value in options.items() if name not in names}
        from adapterkit.cli.batch import run_steps

        ctx.exit(run_steps(file, as_json=as_json, quiet=quiet, **steps))
    from adapterkit.core.errors import Waiting

    try:
        with ProgressBar(quiet or options["dry_run"]) as bar:
            outcome: Any = function_of(verb)(file, progress=bar, **options)
    except Waiting as error:
        fail(error, WAITING)
    if as_json:
        print_json(vars(outcome))
    elif options["dry_run"]:
        for name in outcome.share:
            click.echo(name)
    elif not quiet:
        _print_outcome(file, outcome)


def _print_outcome(file: str, outcome: "Outcome") -> None:
    others = len({*outcome.made} - {*outcome.share})
    text = f"worker {outcome.worker}/{outcome.worker_count}: wrote {len(outcome.made)} files"
    text += f", {others} of them for other workers" if others else ""
    if outcome.finished:
        text += "; the output is already published"
    elif outcome.left:
        text += f"; other workers are writing {len(outcome.left)} more"
    else:
        text += f"; all files are written\nnext: {command('adapterkit finish', file)}"
    click.echo(text, err=True)


def convert(
    verb: type[Verb],
    src: str | None,
    detect: bool,
    listing: bool,
    from_list: str | None,
    out_pattern: str | None,
    **options: Any,
) -> None:
    """Convert a source, or those of a list; or print the contents of a source, or the formats."""
    _check_usage(src, detect, listing, from_list, out_pattern, options)
    if listing:
        from adapterkit.verbs.look.formats import formats_table, list_formats

        document = list_formats()
        _print(document, formats_table(document), options["as_json"])
    elif detect:
        from adapterkit.verbs.look.formats import detect_format, detection_table

        assert src is not None
        document = detect_format(src, allow_pickle=options["allow_pickle"])
        _print(document, detection_table(document), options["as_json"])
    elif from_list is not None:
        from adapterkit.cli.batch import convert_all

        click.get_current_context().exit(convert_all(from_list, out_pattern or "", **options))
    else:
        run_verb(verb, src, **options)


def _check_usage(
    src: str | None,
    detect: bool,
    listing: bool,
    from_list: str | None,
    out_pattern: str | None,
    options: Json,
) -> None:
    """A usage error unless there is one thing to do, with the options that it needs."""
    given = {"SRC": src is not None, "--list": listing, "--from-list": from_list is not None}
    if sum(given.values()) != 1:
        which = " and ".join(name for name, is_given in given.items() if is_given) or "no source"
        raise click.UsageError(f"{which} given: give one of SRC, --list and --from-list FILE")
    if listing or detect:
        taken = {"--to": options["to"], "--out": options["out"], "--out-pattern": out_pattern}
        more = [name for name, value in taken.items() if value is not None]
        if more or (detect and src is None):
            takes = "--list takes no other option" if listing else "--detect takes only SRC"
            raise click.UsageError(f"{takes}: remove {', '.join(more) or '--from-list'}")
        return
    if options["plan"] is not None and src is None:
        raise click.UsageError("--plan takes one SRC, not --from-list")
    if options["to"] is None:
        raise click.UsageError("Missing option '--to'.")
    needed, other = ("--out-pattern", "--out") if src is None else ("--out", "--out-pattern")
    values = {"--out": options["out"], "--out-pattern": out_pattern}
    source = "--from-list" if src is None else "SRC"
    if values[other] is not None:
        raise click.UsageError(f"{source} and {other} given: give {needed}, and remove {other}")
    if values[needed] is None:
        raise click.UsageError(f"Missing option '{needed}', the output of {source}.")


def _print(document: Json, table: str, as_json: bool) -> None:
    if as_json:
        print_json(document)
    else:
        click.echo(table)


# Commands that do more than call a verb and print its plan or receipt; and options of theirs alone
ACTIONS: dict[str, Callable[..., Any]] = {
    "convert": convert,
    "check": check,
    "compare": compare,
    "diagnose": reading(_show_findings, lambda result: not result["findings"]),
    "diff": diff,
    "fit": fit,
    "inspect": inspect,
    "report": report,
    "rerun": reading(_show_same),
    "run": run,
    "score": score,
    "verify": reading(print_verified),
}
QUIETLY = (
    "check", "compare", "diagnose", "finish", "fit", "report", "rerun", "run", "score", "verify",
)  # fmt: skip
OWN_OPTIONS = {name: [json_option, quiet_option] for name in QUIETLY} | {
    "convert": CONVERT_OPTIONS,
    "diff": [json_option, QUIET_DIFF],
    "inspect": [
        json_option,
        click.Option(["--modules"], is_flag=True, help="List all modules, one per line."),
    ],
}

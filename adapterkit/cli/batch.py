"""Many jobs in one command, conversions of a list or steps of a pipeline: each is done or refused
on its own, and all are reported."""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from adapterkit.cli.output import ProgressBar, print_json
from adapterkit.core.checkpoint.folder import WEIGHTS
from adapterkit.core.checkpoint.hub_ids import is_on_hub, parse
from adapterkit.core.checkpoint.shards import PICKLES
from adapterkit.core.errors import AdapterkitError, Interrupted, Problems, Refused, as_usage, shown
from adapterkit.core.records import Json
from adapterkit.core.verb import called

PLACES = ("{name}", "{parent}")


def convert_all(file: str, pattern: str, *, as_json: bool, quiet: bool, **options: Any) -> int:
    """Convert each source in the file's lines; the exit status: 0 if all are done, else 1.

    Empty lines and those that start with # are skipped. Raises `Refused` before the first
    conversion if two outputs are the same, `Interrupted` on a signal.
    """
    from adapterkit.adapters.formats.convert import Convert, convert
    from adapterkit.many.workflows.workflow import outcome, refusal, report

    del options["out"], options["plan"]
    with as_usage():
        called(Convert, "SRC", out="OUT", **options)  # a wrong value is that of no source
    jobs, results = plan_outputs(read_lines(file), pattern), []
    for source, out in jobs:
        row: Json = {"source": source, "out": out}
        try:
            with ProgressBar(quiet or options["dry_run"]) as bar:
                row |= outcome(convert(source, out=out, progress=bar, **options))
        except (KeyboardInterrupt, Interrupted):
            raise Interrupted(
                f"stopped after {len(results)} of {len(jobs)} conversions",
                hint="run the same command with --resume",
            ) from None
        except AdapterkitError as error:
            row |= refusal(error)
        results.append(row)
        if not quiet and not as_json:
            _print_row(row)
    return _finish(report("conversions", results), as_json, quiet)


def run_steps(file: str, *, as_json: bool, quiet: bool, dry_run: bool, **options: Any) -> int:
    """Carry out the steps of a pipeline's file; the exit status: 0 if all are done, else 1.

    Raises as `run_pipeline` does.
    """
    from adapterkit.many.workflows.workflow import run_pipeline

    tell = (lambda row: None) if quiet or as_json else _print_row
    with ProgressBar(quiet or dry_run) as bar:
        result = run_pipeline(file, dry_run=dry_run, progress=bar, tell=tell, **options)
    return _finish(result, as_json, quiet)


def _finish(report: Json, as_json: bool, quiet: bool) -> int:
    """Print the rest of a report; the exit status."""
    totals = report["totals"]
    if as_json:
        print_json(report)
    elif not quiet:
        counts = [f"{count} {state}" for state, count in totals.items() if count]
        click.echo(", ".join(counts), err=True)
    return 1 if totals["refused"] else 0


def read_lines(file: str) -> list[str]:
    """The lines of a text file, or of standard input for -; `Refused` if it cannot be read."""
    try:
        with click.open_file(file, encoding="utf-8") as stream:
            return stream.readlines()
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(
            f"{shown(file)} cannot be read: {error}",
            expected="a text file with one source a line",
            where="--from-list",
            hint="check the path",
            code="AK111",
        ) from error


def plan_outputs(lines: Iterable[str], pattern: str) -> list[tuple[str, str]]:
    """(source, output) for each line; `Refused` with all outputs that several sources share."""
    where = f"--out-pattern {shown(pattern)}"
    words = {word for word in re.findall(r"\{[^}]*+\}?", pattern) if word.endswith("}")}
    unknown = sorted(words - set(PLACES))
    if unknown:
        raise Refused(
            f"{', '.join(map(shown, unknown))} in the pattern",
            expected=" or ".join(PLACES),
            where=where,
            hint="use these alone",
            code="AK111",
        )
    sources = [line.strip() for line in lines]
    sources = list(dict.fromkeys(s for s in sources if s and not s.startswith("#")))
    if not sources:
        problem = "no source in the list"
        raise Refused(
            problem, expected="one in each line", where="--from-list", hint="add some", code="AK111"
        )
    jobs: dict[str, str] = {}  # output -> source
    errors = Problems(code="AK111")
    for source in sources:
        name, parent = name_and_parent(source)
        out = pattern.replace("{name}", name).replace("{parent}", parent)
        out = out if is_on_hub(out) else os.path.normpath(out)
        if out in jobs:
            problem = f"{shown(source)} and {shown(jobs[out])} would both be {shown(out)}"
            hint = "use {parent} in the pattern too, or convert them apart"
            errors.add(problem, "one source for each output", hint, where=where)
        jobs.setdefault(out, source)
    errors.raise_all()
    return [(source, out) for out, source in jobs.items()]


def name_and_parent(source: str) -> tuple[str, str]:
    """The values of {name} and {parent}: the name of a file without its ending, or of a folder, and
    the folder around it; for a Hub id, of its file, its subfolder or its repository."""
    hub_id = None if os.path.exists(source) else parse(source)
    if hub_id is not None:
        path = Path(*filter(None, (hub_id.repo, hub_id.subfolder)))
        is_file = hub_id.subfolder.endswith((*WEIGHTS, *PICKLES))
    else:
        path = Path(source).absolute()
        is_file = path.is_file()
    return path.stem if is_file else path.name, path.parent.name


def _print_row(row: Json) -> None:
    """Print one job of the report."""
    job = shown(row["source"]) if "source" in row else f"step {row['step']}, {row['verb']}"
    lines = [f"{row['state']}: {job} -> {shown(row['out'])}"]
    if "message" in row:
        lines += row["message"].splitlines()
    if "totals" in row:
        lines.append(f"{row['totals']['bytes_written']:,} bytes to write")
    lines += [f"warning: {warning}" for warning in row.get("warnings", [])]
    lines += [f"note: {note}" for note in row.get("notes", [])]
    click.echo("\n  ".join(lines), err=True)

"""Many conversions from a list: each is done or refused on its own, and all are reported."""

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click

from adapterkit.cli.output import ProgressBar, print_json
from adapterkit.errors import AdapterkitError, Interrupted, Refused, refuse_all, shown
from adapterkit.hub.ids import parse

PLACES = ("{name}", "{parent}")
STATES = ("done", "done before", "planned", "refused")


def convert_all(file: str, pattern: str, *, as_json: bool, quiet: bool, **options: Any) -> int:
    """Convert each source in the file's lines; the exit status: 0 if all are done, else 1.

    Empty lines and those that start with # say nothing. Raises `Refused` before the first
    conversion where two outputs would be one, `Interrupted` on a signal.
    """
    from adapterkit.verbs.convert import convert

    del options["out"]
    jobs, results = plan_outputs(read_lines(file), pattern), []
    for source, out in jobs:
        try:
            result = _convert(convert, source, out, quiet, options)
        except (KeyboardInterrupt, Interrupted):
            raise Interrupted(
                f"stopped after {len(results)} of {len(jobs)} conversions",
                hint="run the same command with --resume",
            ) from None
        results.append(result)
        if not quiet and not as_json:
            click.echo(_line(result), err=True)
    totals = {state: sum(result["state"] == state for result in results) for state in STATES}
    if as_json:
        print_json({"totals": totals, "conversions": results})
    elif not quiet:
        counts = [f"{count} {state}" for state, count in totals.items() if count]
        click.echo(", ".join(counts), err=True)
    return 1 if totals["refused"] else 0


def read_lines(file: str) -> list[str]:
    """The lines of a text file, of standard input for -; `Refused` where it cannot be read."""
    try:
        with click.open_file(file, encoding="utf-8") as stream:
            return stream.readlines()
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(
            f"{shown(file)} cannot be read: {error}",
            expected="a text file with one source a line",
            where="--from-list",
            hint="check the path",
        ) from error


def plan_outputs(lines: Iterable[str], pattern: str) -> list[tuple[str, str]]:
    """(source, output) of each source in the lines; `Refused` with all outputs that are not one
    source's alone."""
    where = f"--out-pattern {shown(pattern)}"
    unknown = sorted(set(re.findall(r"\{.*?\}", pattern)) - set(PLACES))
    if unknown:
        raise Refused(
            f"{', '.join(map(shown, unknown))} in the pattern",
            expected=" or ".join(PLACES),
            where=where,
            hint="use these alone",
        )
    sources = [line.strip() for line in lines]
    sources = list(dict.fromkeys(s for s in sources if s and not s.startswith("#")))
    if not sources:
        problem = "no source in the list"
        raise Refused(problem, expected="one in each line", where="--from-list", hint="add some")
    jobs: dict[str, str] = {}  # output -> source
    errors: list[AdapterkitError] = []
    for source in sources:
        name, parent = name_and_parent(source)
        out = os.path.normpath(pattern.replace("{name}", name).replace("{parent}", parent))
        if out in jobs:
            problem = f"{shown(source)} and {shown(jobs[out])} would both be {shown(out)}"
            hint = "use {parent} in the pattern too, or convert them apart"
            errors.append(
                Refused(problem, expected="one source for each output", where=where, hint=hint)
            )
        jobs.setdefault(out, source)
    refuse_all(errors)
    return [(source, out) for out, source in jobs.items()]


def name_and_parent(source: str) -> tuple[str, str]:
    """What {name} and {parent} stand for: a file's name without its ending or a folder's, and the
    folder around it; of a Hub id those of its subfolder or its repository."""
    hub_id = None if os.path.exists(source) else parse(source)
    if hub_id is not None:
        path = Path(*filter(None, (hub_id.repo, hub_id.subfolder)))
    else:
        path = Path(source).absolute()
    return path.stem if path.is_file() else path.name, path.parent.name


def _convert(
    convert: Callable[..., Any], source: str, out: str, quiet: bool, options: dict[str, Any]
) -> dict[str, Any]:
    """One conversion as a row of the report."""
    from adapterkit.receipt import Receipt

    row: dict[str, Any] = {"source": source, "out": out}
    try:
        with ProgressBar(quiet or options["dry_run"]) as bar:
            result = convert(source, out=out, progress=bar, **options)
    except Interrupted:
        raise
    except AdapterkitError as error:
        return row | {"state": "refused", "message": str(error)}
    if not isinstance(result, Receipt):
        return row | {"state": "planned", "totals": result.totals()}
    state = "done before" if result.finished_before else "done"
    return row | {"state": state, "notes": result.data["notes"]}


def _line(row: dict[str, Any]) -> str:
    """A row for the terminal."""
    text = f"{row['state']}: {shown(row['source'])}"
    if "message" in row:
        return f"{text}\n  {row['message'].replace(chr(10), chr(10) + '  ')}"
    notes = "".join(f"\n  note: {note}" for note in row.get("notes", []))
    return f"{text} -> {shown(row['out'])}{notes}"

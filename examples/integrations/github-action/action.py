"""The steps of the action: a command of adapterkit, or a check of adapters with a summary."""

import os
import re
import secrets
import shlex
import subprocess
import sys

import adapterkit
from adapterkit.core.errors import AdapterkitError, MultipleErrors, printable

MOST_PROBLEMS, LONGEST = 20, 500  # of an adapter, and the letters of one: a summary holds 1 MiB


def check() -> int:
    """A table of the adapters in the job's summary; 1 where one has a problem."""
    rows, failed = [], False
    for adapter in shlex.split(os.environ["CHECK"]):
        try:
            size, problems = _checked(adapter)
        except AdapterkitError as error:
            each = error.errors if isinstance(error, MultipleErrors) else (error,)
            size, problems = None, [str(one) for one in each]
        failed |= bool(problems)
        rows.append(row(adapter, size, problems))
    lines = ["| adapter | bytes | problems |", "|---|---|---|", *rows, ""]
    with open(os.environ["GITHUB_STEP_SUMMARY"], "a", encoding="utf-8") as summary:
        summary.write("\n".join(lines))
    print("\n".join(lines), flush=True)
    return int(failed)


def _checked(adapter: str) -> tuple[int, list[str]]:
    """Its bytes, and its problems."""
    base, most = os.environ.get("BASE") or None, os.environ.get("MOST")
    found = adapterkit.inspect(adapter, base=base)
    problems = [problem["problem"] for problem in found["problems"]]
    if most and found["bytes"] > int(most):
        problems.append(f"{found['bytes']} bytes are more than {most}")
    for engine in os.environ.get("ENGINES", "").split():
        document = adapterkit.check(adapter, program=engine, base=base)
        problems += [
            f"{document['engine']} {one['verdict']}: {one['problem']}; {one['hint']}"
            + f" {one['command']}" * bool(one["command"])
            for one in document["findings"]
        ]
    return found["bytes"], problems


def row(adapter: str, size: int | None, problems: list[str]) -> str:
    """A line of the table."""
    texts = [code(problem) for problem in problems[:MOST_PROBLEMS]]
    if len(problems) > MOST_PROBLEMS:
        texts.append(f"and {len(problems) - MOST_PROBLEMS} more")
    count = "–" if size is None else f"{size:,}"
    return f"| {code(adapter)} | {count} | {'<br>'.join(texts) or 'none'} |"


def code(text: str) -> str:
    """A stranger's text as code: GitHub makes no link, mention, picture or HTML of it. A table ends
    a cell at `|` in code, too, so it becomes `¦`."""
    text = printable(text.replace("\n", " "))[:LONGEST].replace("|", "¦") or "–"
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * (longest + 1)
    return f"{fence} {text} {fence}"


def run() -> int:
    words = [sys.executable, "-P", "-m", "adapterkit", *shlex.split(os.environ["RUN"])]
    return subprocess.run(words).returncode


def main(step: str) -> int:
    """A step, whose lines in the log are no commands of the runner, as they hold names of files."""
    token = secrets.token_hex(16)
    print(f"::stop-commands::{token}", flush=True)
    try:
        return {"check": check, "run": run}[step]()
    finally:
        print(f"\n::{token}::", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

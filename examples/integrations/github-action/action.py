"""The steps of the action: a command of adapterkit, or a check of adapters with a summary."""

import os
import shlex
import subprocess
import sys

import adapterkit


def check() -> int:
    """A table of the adapters in the job's summary; 1 where one has a problem."""
    base, most = os.environ.get("BASE") or None, os.environ.get("MOST")
    rows, failed = [], False
    for adapter in shlex.split(os.environ["CHECK"]):
        found = adapterkit.inspect(adapter, base=base)
        problems = [problem["found"] for problem in found["problems"]]
        if most and found["bytes"] > int(most):
            problems.append(f"{found['bytes']} bytes are more than {most}")
        for engine in os.environ.get("ENGINES", "").split():
            document = adapterkit.check(adapter, program=engine, base=base)
            problems += [
                f"{document['engine']} {row['verdict']}: {row['problem']}; {row['do']}"
                for row in document["findings"]
            ]
        failed |= bool(problems)
        text = "<br>".join(problem.replace("|", "\\|") for problem in problems) or "none"
        rows.append(f"| `{adapter}` | {found['bytes']:,} | {text} |")
    lines = ["| adapter | bytes | problems |", "|---|---|---|", *rows, ""]
    with open(os.environ["GITHUB_STEP_SUMMARY"], "a", encoding="utf-8") as summary:
        summary.write("\n".join(lines))
    print("\n".join(lines))
    return int(failed)


def run() -> int:
    words = [sys.executable, "-m", "adapterkit", *shlex.split(os.environ["RUN"])]
    return subprocess.run(words).returncode


if __name__ == "__main__":
    sys.exit({"check": check, "run": run}[sys.argv[1]]())

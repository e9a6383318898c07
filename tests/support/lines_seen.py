"""A plugin that writes which lines of the package each test runs, in its own process and in the
forks that it starts, for tests.mutants (Python 3.12 or newer; twice the time of the tests):

    ADAPTERKIT_LINES=FOLDER pytest -p tests.support.lines_seen
"""

import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Generator
from itertools import accumulate
from pathlib import Path

import pytest

import adapterkit

FOLDER = os.environ.get("ADAPTERKIT_LINES", "")
TOOL = 4
PACKAGE = str(Path(adapterkit.__file__).parent) + os.sep
seen: set[tuple[str, int]] = set()


def _line(code, line: int):
    if code.co_filename.startswith(PACKAGE):
        seen.add((code.co_filename, line))
    return sys.monitoring.DISABLE  # until the next test


def begin() -> None:
    """From here on every line counts once."""
    monitoring = sys.monitoring
    if monitoring.get_tool(TOOL) is None:  # a fork has its parent's
        monitoring.use_tool_id(TOOL, "lines")
        monitoring.register_callback(TOOL, monitoring.events.LINE, _line)
        monitoring.set_events(TOOL, monitoring.events.LINE)
    seen.clear()
    monitoring.restart_events()


def write(test: str, seconds: float) -> None:
    """The lines since the begin, into this process's file."""
    lines = defaultdict(list)
    for file, line in sorted(seen):
        lines["adapterkit/" + file.removeprefix(PACKAGE)].append(line)
    with open(f"{FOLDER}/{os.getpid()}.jsonl", "a") as out:
        out.write(json.dumps({"test": test, "seconds": seconds, "lines": lines}) + "\n")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    began = time.monotonic()
    begin()
    result = yield
    write(item.nodeid, time.monotonic() - began)
    return result


def pytest_unconfigure() -> None:
    sys.monitoring.set_events(TOOL, 0)


def tests_by_line(folder: Path, limit: float) -> dict[tuple[str, int], list[str]]:
    """The tests that run each line of each file, the quickest first, of about `limit` seconds."""
    seconds: dict[str, float] = defaultdict(float)
    found: dict[tuple[str, int], set[str]] = defaultdict(set)
    for path in folder.glob("*.jsonl"):
        for text in path.read_text().splitlines():
            record = json.loads(text)
            seconds[record["test"]] += record["seconds"]
            for file, lines in record["lines"].items():
                for line in lines:
                    found[file, line].add(record["test"])

    def quickest(tests: set[str]) -> list[str]:
        ordered = sorted(tests, key=seconds.__getitem__)
        sums = accumulate(seconds[test] for test in ordered)
        return [test for test, total in zip(ordered, sums, strict=True) if total < limit]

    return {line: quickest(tests) or sorted(tests)[:1] for line, tests in found.items()}

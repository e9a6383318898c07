"""Whether the tests see a change: at random places of the package one operator or comparison is
flipped, and the tests of that folder are run (from the project's folder):

    python -m tests.mutants --count 200 --seed 23 --log mutants.jsonl --folders kernels,core/merge

The last line counts the killed; those that survive are to be judged by hand. A mutant takes as long
as its tests until the first of them fails, of those that survive all of them. With `--lines
FOLDER`, which `tests.support.lines_seen` fills, only tests that run its line are run, the quickest
first, for about `--seconds`; a line that none runs is in the outcome. A run goes on after what
its log has.
"""

import argparse
import ast
import contextlib
import importlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue

import pytest

from tests.support.lines_seen import tests_by_line

ROOT = Path(__file__).parents[1]
BESIDE = ("pyproject.toml", "README.md", "LICENSE", ".ci", "docs", "tests", "examples")
PRELOADED = ("torch", "transformers", "peft", "safetensors.torch", "huggingface_hub", "click")
IMPORTED = "ignore:Module already imported:pytest.PytestAssertRewriteWarning"
SECONDS = 1500  # after which a run counts as killed: a mutant may never end
# a folder of the package, the longest that fits -> the tests that are run, the quickest first
SUITES = {
    "adapterkit/adapters": "merge combine/combine formats",
    "adapterkit/adapters/formats": "formats",
    "adapterkit/adapters/kinds": "combine/resize_kinds merge",
    "adapterkit/bases/gguf": "quantized/gguf formats",
    "adapterkit/bases/hub": "hub",
    "adapterkit/bases/images": "merge pipelines",
    "adapterkit/bases/quantized": "quantized merge",
    "adapterkit/cli": "cli options",
    "adapterkit/core": "options test_errors.py planning merge combine jobs",
    "adapterkit/core/checkpoint": "hostile merge faults",
    "adapterkit/core/engine": "engines merge jobs faults",
    "adapterkit/core/merge": "merge",
    "adapterkit/core/output": "hostile merge faults",
    "adapterkit/core/system": "hostile merge faults",
    "adapterkit/core/tasks": "tasks merge combine quantized",
    "adapterkit/core/verify": "engines merge quantized",
    "adapterkit/core/weights": "weights merge runtime",
    "adapterkit/kernels": "kernels combine quantized inits",
    "adapterkit/many": "jobs",
    "adapterkit/runtime": "runtime",
    "adapterkit/verbs/combine": "combine",
    "adapterkit/verbs/fit": "fitting",
    "adapterkit/verbs/init": "inits",
    "adapterkit/verbs/look": "reports cli",
    "adapterkit/verbs/shared": "combine inits runtime",
    "adapterkit/verbs/stats": "statistics runtime jobs",
    "adapterkit": "options test_errors.py merge combine jobs",
}
COMPARISONS: dict[type[ast.cmpop], tuple[str, str]] = {
    ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="), ast.NotEq: ("!=", "=="), ast.Is: ("is", "is not"),
    ast.IsNot: (r"is\s+not", "is"), ast.In: ("in", "not in"), ast.NotIn: (r"not\s+in", "in"),
}  # fmt: skip
OPERATORS: dict[type[ast.operator], tuple[str, str]] = {
    ast.Add: (r"\+", "-"), ast.Sub: ("-", "+"), ast.Mult: (r"\*", "+"), ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "*"), ast.Mod: ("%", "*"), ast.Pow: (r"\*\*", "*"),
}  # fmt: skip
JOINS: dict[type[ast.boolop], tuple[str, str]] = {ast.And: ("and", "or"), ast.Or: ("or", "and")}


@dataclass(frozen=True)
class Mutant:
    """Bytes of a file, and what stands there instead."""

    file: str
    line: int
    start: int
    stop: int
    before: str
    after: str


@dataclass(frozen=True)
class Outcome:
    """What the tests said of a mutant."""

    mutant: Mutant
    killed_by: str  # the test that failed first; none: it survived
    seconds: float
    tests: int  # of how many; 0: none runs its line


def mutants_of(file: str) -> Iterator[Mutant]:
    """Every place of a file that can be flipped."""
    source = (ROOT / file).read_bytes()
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))

    def begin(node: ast.expr) -> int:
        return starts[node.lineno - 1] + node.col_offset

    def end(node: ast.expr) -> int:
        assert node.end_lineno is not None and node.end_col_offset is not None
        return starts[node.end_lineno - 1] + node.end_col_offset

    def between(left: ast.expr, right: ast.expr, flip: tuple[str, str]) -> Iterator[Mutant]:
        found = re.search(flip[0].encode(), source[end(left) : begin(right)])
        if found is not None:
            start = end(left) + found.start()
            yield Mutant(file, left.end_lineno or 0, start, end(left) + found.end(),
                         found[0].decode(), flip[1])  # fmt: skip

    for node in _computed(ast.parse(source)):
        if isinstance(node, ast.Compare):
            operands = [node.left, *node.comparators]
            for left, operator, right in zip(operands, node.ops, operands[1:], strict=False):
                yield from between(left, right, COMPARISONS[type(operator)])
        elif isinstance(node, ast.BinOp) and type(node.op) in OPERATORS and not _is_text(node):
            yield from between(node.left, node.right, OPERATORS[type(node.op)])
        elif isinstance(node, ast.BoolOp):
            for left, right in zip(node.values, node.values[1:], strict=False):
                yield from between(left, right, JOINS[type(node.op)])
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            yield Mutant(file, node.lineno, begin(node), begin(node) + len("not "), "not ", "")


def _computed(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes that are computed: no annotations, and nothing for type checkers."""
    yield node
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not isinstance(child, ast.Assert):
                yield from _computed(child)


def _is_text(node: ast.BinOp) -> bool:
    """Whether an operator joins or fills texts."""
    return any(
        isinstance(side, ast.JoinedStr)
        or (isinstance(side, ast.Constant) and isinstance(side.value, str))
        for side in (node.left, node.right)
    )


def suites_of(file: str) -> list[str]:
    """The folders of tests for a file."""
    folder = max((one for one in SUITES if file.startswith(f"{one}/")), key=len)
    return [f"tests/{name}" for name in SUITES[folder].split()]


def prepare(folder: Path) -> None:
    """A copy of the package, and beside it one of its tests, which cannot mean another package."""
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("adapterkit", "formats"):
        shutil.copytree(ROOT / name, folder / "site" / name, ignore=ignored)
    for name in BESIDE:
        path = ROOT / name
        copy = shutil.copytree if path.is_dir() else shutil.copy
        (folder / "tree").mkdir(exist_ok=True)
        copy(path, folder / "tree" / name)
    shutil.copytree(ROOT / "formats", folder / "tree" / "formats")


def tests_of(mutant: Mutant, seen: dict[tuple[str, int], list[str]]) -> list[str]:
    """The tests that run a mutant's line, or where an expression has several the first of them."""
    lines = range(mutant.line, mutant.line - 6, -1)
    return next((seen[mutant.file, line] for line in lines if (mutant.file, line) in seen), [])


def run_forked(words: list[str], folder: Path) -> tuple[int, str]:
    """The status of pytest in a fork of this process, which has imported what takes long, and what
    it said. `TimeoutError` where it did not end."""
    output = folder / "output"
    child = os.fork()
    if child == 0:
        os.setsid()
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
        os.dup2(1, 2)
        os.chdir(folder / "tree")
        for name in [name for name in sys.modules if name.split(".")[0] in ("adapterkit", "tests")]:
            del sys.modules[name]
        sys.path[:] = [str(folder / "site"), *(path for path in sys.path if path != str(ROOT))]
        os.environ["PYTHONPATH"] = str(folder / "site")
        status = 70
        try:
            status = int(pytest.main(words))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)
    deadline = time.monotonic() + SECONDS
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() > deadline:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise TimeoutError
        time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # what it left running
    return os.waitstatus_to_exitcode(ended[1]), output.read_text(errors="replace")


def try_out(mutant: Mutant, tests: list[str], folder: Path) -> Outcome:
    """Run these tests with a mutant in a prepared folder."""
    file = folder / "site" / mutant.file
    source = (ROOT / mutant.file).read_bytes()
    file.write_bytes(source[: mutant.start] + mutant.after.encode() + source[mutant.stop :])
    words = ["-x", "-q", "-p", "no:cacheprovider", "-W", IMPORTED, *tests]
    began = time.monotonic()
    try:
        status, text = run_forked(words, folder)
        failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", text, re.M)
        killer = (failed or [f"status {status}"])[0] if status else ""
    except TimeoutError:
        killer = "the time"
    finally:
        file.write_bytes(source)
    return Outcome(mutant, killer, time.monotonic() - began, len(tests))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=23)
    parser.add_argument("--folders", default="", help="folders of the package (default: all of it)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--log", type=Path)
    parser.add_argument("--seconds", type=float, default=30, help="of tests that run a line")
    parser.add_argument("--lines", type=Path, help="what tests.support.lines_seen wrote")
    options = parser.parse_args()
    folders = [f"adapterkit/{one}".rstrip("/") for one in options.folders.split(",")]
    files = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("adapterkit/**/*.py"))
    places = [
        mutant
        for file in files
        if any(file.startswith(f"{one}/") for one in folders)
        for mutant in mutants_of(file)
    ]
    chosen = random.Random(options.seed).sample(places, min(options.count, len(places)))
    print(f"{len(chosen)} of {len(places)} places")
    seen = tests_by_line(options.lines, options.seconds) if options.lines else {}
    known: dict[Mutant, Outcome] = {}
    begun = options.log.read_text() if options.log and options.log.exists() else ""
    for line in begun.splitlines():
        record = json.loads(line)
        mutant = Mutant(**record.pop("mutant"))
        known[mutant] = Outcome(mutant, **record)
    for name in PRELOADED:
        importlib.import_module(name)
    killed = 0
    with tempfile.TemporaryDirectory() as root, ThreadPoolExecutor(options.workers) as pool:
        folders: SimpleQueue[Path] = SimpleQueue()
        for number in range(options.workers):
            folder = Path(root) / str(number)
            folder.mkdir()
            prepare(folder)
            folders.put(folder)

        def run(mutant: Mutant) -> Outcome:
            if mutant in known:
                return known[mutant]
            tests = tests_of(mutant, seen) if options.lines else suites_of(mutant.file)
            if not tests:
                return Outcome(mutant, "", 0, 0)
            folder = folders.get()
            try:
                return try_out(mutant, tests, folder)
            finally:
                folders.put(folder)

        for outcome in pool.map(run, chosen):
            one = outcome.mutant
            killed += bool(outcome.killed_by)
            what = f"killed by {outcome.killed_by}" if outcome.killed_by else "SURVIVED"
            what += "" if outcome.tests else ": no test runs it"
            print(f"{one.file}:{one.line}: {one.before!r} -> {one.after!r}: {what}", flush=True)
            if options.log is not None and one not in known:
                with options.log.open("a") as log:
                    log.write(json.dumps(asdict(outcome)) + "\n")
    print(f"{killed} of {len(chosen)} killed")


if __name__ == "__main__":
    main()

"""Benches on which several processes make one output, each a fork that has everything imported.

A rank looks at the others every few milliseconds, and takes one that says nothing for `STALLED`
seconds for gone.
"""

import os
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

import adapterkit
from tests.faults.conftest import AdapterBench, digests, make_adapter, make_base
from tests.golden.inputs import create_inputs
from tests.support.documents import ROOT, blocks
from tests.support.forks import Ended, Forks

QUICK = {
    "many.workers.worker.HEARTBEAT": 0.02,
    "many.workers.worker.POLL": 0.01,
    "many.workers.worker.STALLED": 0.3,
}
JOBS = {
    "merge": ["merge", "base", "adapter", "other=0.5"],
    "init": ["init", "base", "--method", "pissa", "--rank", "2"],
    "loftq": ["loftq", "base", "--rank", "4", "--iterations", "1"],
    "combine": ["combine", "adapter", "other", "--method", "linear"],
}


@dataclass
class RanksBench(AdapterBench):
    """A bench whose output is made by ranks; `words` are the verb's."""

    @property
    def file(self) -> Path:
        return self.root / "out.plan.json"

    @property
    def stage(self) -> Path:
        """The folder of what the ranks share."""
        (folder,) = (self.control / "ranks").iterdir()
        return folder

    def plan(self, *more: str, **settings) -> Ended:
        return self.merge("--plan", str(self.file), *more, **settings)

    def begin(self, worker: str = "auto", *more: str, **settings) -> int:
        """Start a worker; its process."""
        constants = QUICK | settings.pop("constants", {})
        argv = ["run", str(self.file), "--worker", worker, *more]
        return self.start(argv, constants=constants, **settings)

    def worker(self, worker: str = "auto", *more: str, **settings) -> Ended:
        return self.wait(self.begin(worker, *more, **settings))

    def finish(self, *more: str, **settings) -> Ended:
        return self.run(["finish", str(self.file), *more], **settings)

    def marked(self) -> set[str]:
        """The files that have a marker."""
        marks = self.stage / "marks"
        names = {p.relative_to(marks).as_posix() for p in marks.rglob("*.json")}
        return {name.removesuffix(".json") for name in names}

    def clear(self) -> None:
        super().clear()
        self.file.unlink(missing_ok=True)

    def check_done(self, whole: dict[str, str], control: Path | None = None) -> None:
        self.file.unlink()
        super().check_done(whole, control)


@pytest.fixture(scope="session")
def disk(tmp_path_factory) -> Iterator[Path]:
    """In memory, where an fsync costs nothing."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path_factory.getbasetemp()
        return
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def rank_inputs(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("inputs")
    make_base(root / "base")
    make_adapter(root / "adapter")
    make_adapter(root / "other", modules=("q", "k"))
    return root


@pytest.fixture(scope="session")
def ranks_bench(disk: Path, driver: Forks, rank_inputs: Path):
    """A bench for one of JOBS, of which the processes are of this system, with its digests as the
    local engine makes them on Linux; made once."""
    known: dict[str, tuple[RanksBench, dict[str, str]]] = {}

    def make(name: str, system: str = "linux") -> tuple[RanksBench, dict[str, str]]:
        if name not in known:
            root = Path(tempfile.mkdtemp(dir=disk))
            shutil.copytree(rank_inputs, root, dirs_exist_ok=True)
            bench = RanksBench(root, driver, words=JOBS[name])
            known[name] = bench, bench.undisturbed()
        bench, whole = known[name]
        bench.clear()
        pretends = {"system": system} if system != "linux" else {}
        return replace(bench, defaults=bench.defaults | pretends), whole

    return make


@pytest.fixture(scope="module")
def large(disk: Path, driver: Forks, rank_inputs: Path) -> tuple[RanksBench, dict[str, str]]:
    """A merge into a base that is one file."""
    root = Path(tempfile.mkdtemp(dir=disk))
    make_base(root / "base", shards=1)
    shutil.copytree(rank_inputs / "adapter", root / "adapter")
    bench = RanksBench(root, driver, words=["merge", "base", "adapter"])
    bench.defaults = bench.defaults | {"rows": 32}
    return bench, bench.undisturbed()


@pytest.fixture
def merging(ranks_bench) -> tuple[RanksBench, dict[str, str]]:
    return ranks_bench("merge")


# as in docs/machines.md, of a plan that is made again and again
PLAN = (
    "adapterkit merge BASE ADAPTER --out merged --max-shard-size 10KB --overwrite "
    "--plan merged.plan.json"
)
FINISH = "adapterkit finish merged.plan.json --verify"


def launcher_lines() -> dict[str, str]:
    """The lines of docs/machines.md that start four ranks, by their program."""
    lines = "".join(block.text for block in blocks(ROOT / "docs" / "machines.md", "bash"))
    return {line.split()[0]: line for line in lines.splitlines()}


def write_command(folder: Path) -> None:
    """A command `adapterkit` that is this one."""
    command = folder / "adapterkit"
    command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m adapterkit "$@"\n')
    command.chmod(0o755)


def workers_in(printed: str) -> list[str]:
    """The ranks that have said what they did."""
    return sorted(re.findall(r"^worker (\d+/\d+): ", printed, re.MULTILINE))


@dataclass(frozen=True)
class LinesBench:
    """A folder with BASE and ADAPTER, and the digests of what one process makes of PLAN."""

    folder: Path
    whole: dict[str, str]

    def check_done(self) -> None:
        assert digests(self.folder / "merged") == self.whole


@pytest.fixture(scope="module")
def lines_bench(tmp_path_factory: pytest.TempPathFactory) -> LinesBench:
    folder = tmp_path_factory.mktemp("lines")
    create_inputs(folder)
    (folder / "base32").rename(folder / "BASE")
    (folder / "law").rename(folder / "ADAPTER")
    adapterkit.merge(
        folder / "BASE", [folder / "ADAPTER"], out=folder / "merged", max_shard_size="10KB"
    )
    whole = digests(folder / "merged")
    shutil.rmtree(folder / "merged")
    return LinesBench(folder, whole)

"""However many processes share the sums of `stats`, and whatever happens to them, the file is the
one that a single process writes."""

import contextlib
import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest
from torch import nn

import adapterkit
from adapterkit.checkpoint.output.journal import line_of, read_entry
from adapterkit.checkpoint.output.rank_stage import RankStage
from adapterkit.engines.ranks import rank as ranks
from adapterkit.errors import Interrupted, Refused
from adapterkit.jobs.plan_file import read_plan
from adapterkit.plan import Plan
from adapterkit.statistics.model import activations, stored_model
from adapterkit.statistics.model import layers as units
from adapterkit.statistics.model.stored_model import StoredModel
from adapterkit.statistics.plan import Collection
from adapterkit.statistics.rank_ledger import FOLDER, accepts, path_of
from tests.jobs.conftest import RanksBench
from tests.jobs.test_ranks import SLOW, stopped, until
from tests.statistics.test_layerwise import MODELS

KINDS = {"inputs": "covariance,mean,pca", "gradient": "gradient"}
# planning builds the model's skeleton: more ranks than two are slow
MATRIX = [
    pytest.param(what, ranks, marks=[pytest.mark.slow] * (ranks > 2 or what == "gradient"))
    for what in KINDS
    for ranks in (1, 2, 5)
]


@dataclass
class StatisticsBench(RanksBench):
    """A bench of `stats`, whose output is a file."""

    def __post_init__(self):
        super().__post_init__()
        self.out = self.root / "out.safetensors"

    def digests(self) -> dict[str, str]:
        return {self.out.name: hashlib.sha256(self.out.read_bytes()).hexdigest()}

    def clear(self) -> None:
        super().clear()
        self.out.unlink(missing_ok=True)

    def check_done(self, whole: dict[str, str], control: Path | None = None) -> None:
        self.file.unlink()
        assert self.digests() == whole
        assert not [p.name for p in self.root.iterdir() if "adapterkit" in p.name]

    def sums(self) -> set[str]:
        """The files of sums that are done."""
        return {Path(name).name for name in self.marked()}


@pytest.fixture(scope="session")
def benches(disk: Path, driver, rank_inputs: Path):
    """A bench for each of KINDS, made once."""
    known: dict[str, tuple[StatisticsBench, dict[str, str]]] = {}

    def make(kind: str = "inputs") -> tuple[StatisticsBench, dict[str, str]]:
        if kind not in known:
            root = Path(tempfile.mkdtemp(dir=disk))
            shutil.copytree(rank_inputs / "base", root / "base")
            write_ids(root / "ids.jsonl")
            words = ["stats", "base", "--data", str(root / "ids.jsonl"), "--batch", "2"]
            bench = StatisticsBench(root, driver, words=[*words, "--what", KINDS[kind]])
            known[kind] = bench, bench.undisturbed()
        bench, whole = known[kind]
        bench.clear()
        return bench, whole

    return make


def write_ids(path: Path) -> Path:
    draw = random.Random(0)
    texts = [[draw.randrange(40) for _ in range(5 + i)] for i in range(6)]
    rows = [{"input_ids": text, "labels": text} for text in texts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("kind, ranks", MATRIX)
def test_the_bytes_of_one_process(benches, kind: str, ranks: int):
    bench, whole = benches(kind)
    bench.plan().succeeded()
    pids = [bench.begin(f"{rank}/{ranks}") for rank in range(ranks)]
    for pid in pids:
        bench.wait(pid).succeeded()
    bench.finish().succeeded()
    bench.check_done(whole)


@pytest.mark.parametrize("kind, ranks", MATRIX)
def test_the_bytes_of_one_process_where_one_is_killed(benches, kind: str, ranks: int):
    """At its second file; the others make what it leaves, alone it is run again."""
    bench, whole = benches(kind)
    bench.plan().succeeded()
    fault = {"kill": True, "calls": ["fsync"], "match": "s.safetensors", "when": 3}
    assert bench.rank(f"0/{ranks}", fault=fault).status == -signal.SIGKILL
    assert len(bench.sums()) == 1
    pids = [bench.begin(f"{rank}/{ranks}") for rank in range(1, ranks)]
    for pid in pids:
        bench.wait(pid).succeeded()
    if ranks == 1:
        bench.finish().failed_cleanly("files are not there")
        bench.rank("0/1").succeeded()
    bench.finish().succeeded()
    bench.check_done(whole)


def test_ranks_share_the_sums(benches):
    """While one is stopped at its first layer the other makes the rest, and no more."""
    bench, whole = benches()
    bench.plan().succeeded()
    stop = {"calls": ["pwrite"], "match": ".sums.", "when": 1, "act": [["stop", "."]]}
    pid = bench.begin("0/2", fault=stop)
    until(lambda: stopped(pid))
    patient = bench.begin("1/2", constants={"ranks.rank.STALLED": 60})
    until(lambda: len(bench.sums()) >= 2)
    os.kill(pid, signal.SIGCONT)
    ended = [bench.wait(each) for each in (pid, patient)]
    for each in ended:
        each.succeeded()
    texts = [each.stderr for each in ended]
    assert "wrote 1 files" in texts[0] and "wrote 3 files" in texts[1], texts
    bench.finish().succeeded()
    bench.check_done(whole)


def test_a_stopped_rank_wakes_after_its_file_was_made(benches):
    """And after all is finished, too: it changes nothing."""
    bench, whole = benches()
    for finished in (False, True):
        bench.clear()
        bench.plan().succeeded()
        stop = {"calls": ["fsync"], "match": ".sums.", "when": 1, "act": [["stop", "."]]}
        pid = bench.begin("0/2", fault=stop)
        until(lambda pid=pid: stopped(pid))
        bench.rank("1/2").succeeded()
        if finished:
            bench.finish().succeeded()
        os.kill(pid, signal.SIGCONT)
        bench.wait(pid).succeeded()
        if not finished:
            bench.finish().succeeded()
        bench.check_done(whole)


def test_a_rank_of_an_older_plan_wakes(benches):
    """Its files go nowhere."""
    bench, whole = benches()
    bench.plan("--samples", "5").succeeded()
    stop = {"calls": ["fsync"], "match": ".sums.", "when": 1, "act": [["stop", "."]]}
    pid = bench.begin("0/2", fault=stop)
    until(lambda: stopped(pid))
    bench.plan("--overwrite").succeeded()
    bench.rank().succeeded()
    os.kill(pid, signal.SIGCONT)
    bench.wait(pid).failed_cleanly()
    bench.finish().succeeded()
    bench.check_done(whole)


def test_a_changed_input_is_the_end_for_all(benches):
    """One that changes under a rank, and data that are others."""
    bench, whole = benches()
    bench.plan().succeeded()
    data = bench.root / "ids.jsonl"
    lines = data.read_text()
    data.write_text(lines.replace("[", "[1, "))
    bench.rank().failed_cleanly("data.sha256 differs")
    data.write_text(lines)
    path = bench.root / "base" / "model-00001-of-00003.safetensors"
    before = path.read_bytes()
    poke = [["poke", str(path), 4000, [1, 2, 3]]]
    change = {"calls": ["fsync"], "match": ".sums.", "when": 1, "act": poke}
    bench.rank("0/2", fault=change).failed_cleanly("changed between plan and end")
    assert (bench.stage / "marks" / "SPOILED").is_file() and len(bench.sums()) == 1
    bench.rank("1/2").failed_cleanly("is not the file that was planned with", path.name)
    path.write_bytes(before)
    bench.plan("--overwrite").succeeded()
    bench.rank().succeeded()
    bench.finish().succeeded()
    bench.check_done(whole)


def test_missing_files_are_named(benches):
    bench, whole = benches()
    bench.plan().succeeded()
    ended = bench.finish()
    ended.failed_cleanly("4 of 4 files are not there", ".sums.", "outside", f"run {bench.file}")
    printed = bench.run(["run", str(bench.file), "--dry-run"]).stdout.split()
    assert len(printed) == 4 and printed[-1] == "work/outside.safetensors"
    bench.merge("--resume").failed_cleanly("the output of a plan file")
    bench.rank().succeeded()
    gone = bench.stage / "out" / printed[1]
    gone.unlink()
    bench.finish().failed_cleanly("1 of 4 files", gone.name)
    bench.rank("4/9").succeeded()
    bench.finish("--verify").failed_cleanly("--verify does not apply to statistics")
    bench.finish("--push", "me/statistics").failed_cleanly(
        "--push does not apply to a file of statistics"
    )
    bench.finish().succeeded()
    assert "finished before" in bench.finish().stderr
    bench.rank().succeeded()
    bench.check_done(whole)


@pytest.mark.parametrize("entry", [{"torch": "1.0"}, {"device": "cpu AVX512, 99 threads"}])
def test_two_kinds_of_arithmetic_are_refused(benches, entry: dict):
    bench, _ = benches()
    bench.plan().succeeded()
    bench.rank().succeeded()
    path = next((bench.stage / "marks").rglob("*.json"))
    path.write_bytes(line_of(read_entry(path) | entry))
    for ended in (bench.finish(), bench.rank()):
        ended.failed_cleanly("files were made on", next(iter(entry.values())), "--workers")


@pytest.mark.parametrize("kind, step", [
    ("inputs", 199), *(pytest.param(kind, 1, marks=SLOW) for kind in KINDS),
])  # fmt: skip
def test_a_rank_is_killed_at_each_call(benches, kind: str, step: int):
    bench, whole = benches(kind)
    for when in itertools.count(random.Random(kind).randrange(step) + 1, step):
        bench.clear()
        bench.plan().succeeded()
        quiet = {"ranks.rank.BEAT": 60}  # each word of a rank is calls, too
        ended = bench.rank("0/2", fault={"kill": True, "when": when}, constants=quiet)
        if ended.status == 0:
            break
        assert ended.status == -signal.SIGKILL
        for name in bench.marked():
            assert (bench.stage / "out" / name).exists(), ended.last
        bench.rank("1/2").succeeded()
        bench.finish().succeeded()
        bench.check_done(whole)
    assert when > 20


@pytest.mark.parametrize("step", [127, pytest.param(1, marks=SLOW)])
@pytest.mark.parametrize("command", ["plan", "finish"])
def test_the_plan_and_the_end_are_killed_at_each_call(benches, command: str, step: int):
    bench, whole = benches()
    for when in itertools.count(random.Random(command).randrange(step) + 1, step):
        bench.clear()
        fault = {"kill": True, "when": when}
        if command == "plan":
            ended = bench.plan(fault=fault)
            bench.plan("--overwrite").succeeded()
            bench.rank().succeeded()
        else:
            bench.plan().succeeded()
            bench.rank().succeeded()
            ended = bench.finish(fault=fault)
        bench.finish().succeeded()
        bench.check_done(whole)
        if ended.status == 0:
            break
        assert ended.status == -signal.SIGKILL
    assert when > 8


# -- in one process: models whose units are not called once each --------------------------------


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Embeddings and heads are units, and activations go to the file."""
    monkeypatch.setattr(units, "LARGE", 1)
    monkeypatch.setattr(activations, "SMALL", 1)


def stopping(step: int):
    """A progress that stops the job after so many steps."""
    done = itertools.count(1)

    def progress(count: int) -> None:
        if next(done) == step:
            raise KeyboardInterrupt

    return progress


class Twice(nn.ModuleList):
    """Layers that the code around them runs twice, one after the other."""

    def __getitem__(self, which):
        found = super().__getitem__(which)
        return [*found] * 2 if isinstance(which, slice) else found


@pytest.fixture
def twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Llama runs its layers twice."""

    def build(*args):
        model = build_plain(*args)
        model.model.layers.__class__ = Twice
        return model

    build_plain = stored_model._without_data
    monkeypatch.setattr(stored_model, "_without_data", build)


def by_ranks(
    tmp_path: Path,
    name: str,
    steps: Iterable[int],
    beside: Callable[[Plan, Path], None] = lambda plan, file: None,
    **options,
) -> list[str]:
    """Compare the file of a single process with that of ranks, of which each but the last stops at
    a step, `beside` another one; the names of the files of sums."""
    MODELS[name][0]().save_pretrained(tmp_path / "base")
    options |= {"data": write_ids(tmp_path / "ids.jsonl"), "batch": 3, "memory": "1KB"}
    options |= {"what": "covariance,pca,gradient"}
    one = adapterkit.stats(tmp_path / "base", out=tmp_path / "one.safetensors", **options)
    file, out = tmp_path / "plan.json", tmp_path / "two.safetensors"
    beside(adapterkit.write_plan(file, "stats", tmp_path / "base", out=out, **options), file)
    for step in steps:
        with contextlib.suppress(Interrupted):
            adapterkit.run(file, rank="0/2", progress=stopping(step))
    assert not adapterkit.run(file, rank="1/2").left
    names = [path.name for path in tmp_path.glob(f".two*/ranks/*/out/{FOLDER}/*")]
    two = adapterkit.finish(file)
    assert Path(one.out).read_bytes() == Path(two.out).read_bytes()
    known = [receipt.data | {"timings": 0, "files": 0} for receipt in (one, two)]
    assert known[0] == known[1]
    assert [path.name for path in tmp_path.glob(".*")] == []
    return names


@pytest.mark.parametrize("name, whole", [
    ("albert", False), ("t5", False), ("gpt2", False), ("mixtral", False), ("llama", True),
])  # fmt: skip
def test_kinds_of_models(tmp_path: Path, small_units, name: str, whole: bool):
    """A rank stops at some step, another goes on."""
    names = by_ranks(tmp_path, name, (4, 11, 17), whole=whole)
    assert (names == ["whole.safetensors"]) == whole


def test_layers_that_are_used_twice(tmp_path: Path, small_units, twice):
    """Each use has a file of its own; a rank goes on from that of another."""
    names = by_ranks(tmp_path, "llama", (6, 9, 12, 15, 21))
    assert sum("-2.sums." in name for name in names) == 3
    assert sum("-2.gradients." in name for name in names) == 3


def test_the_second_use_waits_for_the_first(tmp_path: Path, small_units, twice, monkeypatch):
    """Of a layer at whose first use another rank is, until that one is taken for gone."""
    for name, value in {"POLL": 0.01, "BEAT": 0.02, "STALLED": 1.0}.items():
        monkeypatch.setattr(ranks, name, value)

    def other(plan: Plan, file: Path) -> None:
        control = tmp_path / ".two.safetensors.adapterkit"
        stage = RankStage(control, read_plan(file).job.digest, 9, accepts=accepts)
        stage.beat(0, 0)
        stage.claim(path_of(Collection.of(plan).parts[1]))

    names = by_ranks(tmp_path, "llama", (), beside=other)
    assert sum("-2.sums." in name for name in names) == 3


def test_nothing_is_run_that_is_not_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A rank reads no layer behind the last one that is left for it."""
    MODELS["llama"][0]().save_pretrained(tmp_path / "base")
    data, file = write_ids(tmp_path / "ids.jsonl"), tmp_path / "plan.json"
    out = tmp_path / "out.safetensors"
    adapterkit.write_plan(file, "stats", tmp_path / "base", data=data, out=out)
    outcome = adapterkit.run(file)
    (stage,) = (tmp_path / ".out.safetensors.adapterkit" / "ranks").iterdir()
    (stage / "out" / outcome.made[1]).unlink()
    read = []
    load = StoredModel.load

    def noted(self, names, device):
        read.extend(name.split(".")[2] for name in names if ".layers." in name)
        return load(self, names, device)

    monkeypatch.setattr(StoredModel, "load", noted)
    assert adapterkit.run(file).made == [outcome.made[1]]
    assert {*read} == {"0", "1"}
    assert not adapterkit.run(file).made and {*read} == {"0", "1"}


def test_refusals(tmp_path: Path):
    with pytest.raises(Refused, match="stats with --engine ray"):
        adapterkit.stats(tmp_path, data="x.txt", out="x.safetensors", engine="ray")
    with pytest.raises(Refused, match="no such path"):
        adapterkit.write_plan(tmp_path / "p", "stats", "nothing", data="x.txt", out="x.safetensors")

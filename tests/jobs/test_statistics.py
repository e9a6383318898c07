"""However many processes share the sums of `stats`, and whatever happens to them, the file is the
one that a single process writes."""

import contextlib
import hashlib
import itertools
import json
import random
import shutil
import signal
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest
from torch import nn

import adapterkit
from adapterkit.core.errors import Interrupted
from adapterkit.core.output.journal import line_of, read_entry
from adapterkit.many.workers.worker import Liveness
from adapterkit.verbs.stats.model import activations, stored_model
from adapterkit.verbs.stats.model import layers as units
from adapterkit.verbs.stats.model.layerwise_schedule import LayerwiseSchedule
from adapterkit.verbs.stats.model.stored_model import StoredModel
from tests.jobs.conftest import RanksBench
from tests.jobs.test_ranks import SLOW
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
        self.receipt.unlink(missing_ok=True)

    @property
    def receipt(self) -> Path:
        return self.out.with_name(f"{self.out.name}.adapterkit.json")

    def check_done(self, whole: dict[str, str], control: Path | None = None) -> None:
        self.file.unlink()
        assert self.digests() == whole
        assert [p for p in self.root.iterdir() if "adapterkit" in p.name] == [self.receipt]

    def sums(self) -> set[str]:
        """The blocks, and the file, that are done."""
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


def test_a_killed_rank_and_a_stopped_one(benches):
    """Of two ranks one dies in its pass; the sums that it wrote are taken. The last one that comes
    to an end makes the file."""
    bench, whole = benches()
    bench.plan().succeeded()
    fault = {"kill": True, "calls": ["fsync"], "match": ".sums.", "when": 3}
    assert bench.worker("0/2", fault=fault).status == -signal.SIGKILL
    assert not bench.sums() and [*bench.stage.rglob("*.sums.safetensors")]
    bench.finish().failed_cleanly("1 of 1 files are missing", bench.out.name)
    bench.worker("1/2").succeeded()
    assert bench.out.name in bench.sums() and len(bench.sums()) == 4
    bench.finish().succeeded()
    bench.check_done(whole)


def test_a_changed_input_is_the_end_for_all(benches):
    """One that changes under a rank, and data that are others."""
    bench, whole = benches()
    bench.plan().succeeded()
    data = bench.root / "ids.jsonl"
    lines = data.read_text()
    data.write_text(lines.replace("[", "[1, "))
    bench.worker().failed_cleanly("options.data.sha256")
    data.write_text(lines)
    path = bench.root / "base" / "model-00001-of-00003.safetensors"
    before = path.read_bytes()
    poke = [["poke", str(path), 4000, [1, 2, 3]]]
    change = {"calls": ["fsync"], "match": ".sums.", "when": 1, "act": poke}
    bench.worker("0/2", fault=change).failed_cleanly("changed between plan and end")
    assert (bench.stage / "marks" / "FAILED").is_file() and not bench.sums()
    bench.worker("1/2").failed_cleanly("is not the file that was planned with", path.name)
    path.write_bytes(before)
    bench.plan("--overwrite").succeeded()
    bench.worker().succeeded()
    bench.finish().succeeded()
    bench.check_done(whole)


@pytest.mark.parametrize("entry", [{"torch": "1.0"}, {"device": "cpu AVX512, 99 threads"}])
def test_two_kinds_of_arithmetic_are_refused(benches, entry: dict):
    bench, _ = benches()
    bench.plan().succeeded()
    bench.worker().succeeded()
    path = next((bench.stage / "marks").rglob("*.json"))
    path.write_bytes(line_of(read_entry(path) | entry))
    for ended in (bench.finish(), bench.worker()):
        ended.failed_cleanly("files were made on", next(iter(entry.values())), "--workers")


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


def by_ranks(tmp_path: Path, name: str, steps: Iterable[int], **options) -> list[str]:
    """Compare the file of a single process with that of workers, which all but the last stop at a
    step; the names of the files of sums."""
    MODELS[name][0]().save_pretrained(tmp_path / "base")
    options |= {"data": write_ids(tmp_path / "ids.jsonl"), "batch": 2, "memory": "1KB"}
    options |= {"what": "covariance,pca,gradient"}
    one, two = (tmp_path / place / "s.safetensors" for place in ("one", "two"))
    one = adapterkit.stats(tmp_path / "base", out=one, **options)
    file = tmp_path / "plan.json"
    two.parent.mkdir()
    adapterkit.write_plan(file, "stats", tmp_path / "base", out=two, **options)
    for step in steps:
        with contextlib.suppress(Interrupted):
            adapterkit.run(file, worker="0/2", progress=stopping(step))
    assert not adapterkit.run(file, worker="1/2").left
    names = [path.name for path in two.parent.glob(".s*/ranks/*/work/*/*")]
    two = adapterkit.finish(file)
    assert Path(one.out).read_bytes() == Path(two.out).read_bytes()
    known = [receipt.data | {"timings": 0} for receipt in (one, two)]
    assert known[0] == known[1]
    assert [path.name for path in tmp_path.rglob(".*")] == []
    return names


@pytest.mark.parametrize("name, whole", [
    ("albert", False), pytest.param("t5", False, marks=SLOW), ("mixtral", False), ("llama", True),
])  # fmt: skip
def test_kinds_of_models(tmp_path: Path, small_units, name: str, whole: bool):
    """A rank stops at some step, another goes on with what it has written."""
    names = by_ranks(tmp_path, name, (4, 11), whole_model=whole)
    assert ({*names} == {"whole.safetensors"}) == whole


def test_layers_that_are_used_twice(tmp_path: Path, small_units, twice):
    """The sums of each use are added in its turn."""
    names = by_ranks(tmp_path, "llama", (6,))
    assert sum(name.startswith("2@") and ".sums." in name for name in names) == 3 * 3


def test_ranks_share_the_forward_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Each runs its own batches alone, and all that it has go through the model together."""
    MODELS["llama"][0]().save_pretrained(tmp_path / "base")
    data, file = write_ids(tmp_path / "ids.jsonl"), tmp_path / "plan.json"
    out = tmp_path / "out.safetensors"
    adapterkit.write_plan(file, "stats", tmp_path / "base", data=data, batch=1, out=out)
    passes, loads = [], []
    run, load = LayerwiseSchedule.run, StoredModel.load
    monkeypatch.setattr(LayerwiseSchedule, "run", lambda *a: (passes.append(len(a[1])), run(*a))[1])
    monkeypatch.setattr(StoredModel, "load", lambda *a: (loads.append(a), load(*a))[1])
    with monkeypatch.context() as patch:  # nobody takes files of another
        patch.setattr(Liveness, "alive", lambda *_: True)
        patch.setattr(Liveness, "advancing", lambda *_: True)
        for rank in range(2):
            own = [f"{out.name}@{n}-{n + 1}" for n in range(rank, 6, 2)]
            assert adapterkit.run(file, worker=f"{rank}/2").made == own
    assert passes == [3, 3] and len(loads) == 2 * 4  # three layers, and what is around them
    assert adapterkit.run(file, worker="0/2").made == [out.name] and passes == [3, 3]

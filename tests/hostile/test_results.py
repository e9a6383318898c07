"""What was noted of files that are done, forged: it counts as not noted, and the files are made
again; what a receipt says was measured here."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import adapterkit
from adapterkit.engines import pieces, rank_parts
from adapterkit.errors import Refused
from adapterkit.tasks import rows
from tests.support.raw_files import base, plain

pytestmark = pytest.mark.usefixtures("one_thread")

WEIGHTS = "model.safetensors"


@pytest.fixture
def work(tmp_path: Path, monkeypatch) -> Path:
    base().write(tmp_path / "base")
    plain().folder().write(tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def in_parts(work: Path, monkeypatch) -> Path:
    """Files are made in parts, however small."""
    monkeypatch.setattr(rank_parts, "LEAST", 1)
    monkeypatch.setattr(pieces, "RUN", 64)
    monkeypatch.setattr(rows, "ELEMENTS", 16)
    return work


def planned() -> Path:
    adapterkit.write_plan("p.json", "merge", "base", ["adapter"], out="out")
    return Path("p.json")


def marks() -> Path:
    (folder,) = Path(".out.adapterkit/ranks").iterdir()
    return folder / "marks"


def undisturbed() -> dict[str, Any]:
    """The metrics of the job, as one process gives them."""
    return adapterkit.merge("base", ["adapter"], out="alone").data["parameters"]


def forged_results(good: dict) -> Iterator[dict]:
    """What may stand in the place of a file's result; none of it is one."""
    (key, metrics), *_ = good["metrics"].items()
    others = [
        metrics | {"delta": value} for value in ("x", None, math.nan, math.inf, 1e301, True, [1])
    ]
    others += [metrics | {"adapters": value} for value in ("adapter", ["another"], [], [1], None)]
    others += [metrics | {"rank": 0.5}, metrics | {"another": 1}, metrics | {"\x1b[31m": 1}, {}]
    for other in others:
        yield {"metrics": good["metrics"] | {key: other}}
    yield {"metrics": {}}
    yield {"metrics": good["metrics"] | {"lm_head": {"delta": 1.0}}}
    marked = next(iter(good["marks"]))
    for marks in ({}, {"x": "0" * 16}, good["marks"] | {"x": "0" * 16}):
        yield {"marks": marks}
    for mark in ("", "0" * 15, "X" * 16, 7, None):
        yield {"marks": good["marks"] | {marked: mark}}
    for sha in (None, "", "0" * 63, "\x1b" * 64, good["sha256"].upper()):
        yield {"sha256": sha}
    yield from ({"grown": grown} for grown in (1, -1, 0.0, 1 << 80, True))
    yield from ({"tensors": tensors} for tensors in (1, -1, True))
    yield {"handoffs": {"x": ["F32", [1], 0]}}
    yield from ({"size": size} for size in (good["size"] + 1, -1, float(good["size"]), 1 << 80))


OTHERS = [
    {"device": "a toaster"}, {"device": "cuda"}, {"device": "cuda \x1b[31m, torch 2"},
    {"device": "cuda " + "x" * 300}, {"seconds": -1}, {"seconds": 1e300}, {"seconds": True},
    {"seconds": math.inf}, {"host": "\x1b[31m"}, {"torch": "\n"}, {"attempt": "\0"},
]  # fmt: skip


def test_forged_markers(work: Path):
    file, expected = planned(), undisturbed()
    adapterkit.run(file)
    marker = marks() / f"{WEIGHTS}.json"
    good = json.loads(marker.read_text())
    forged = [good | {"shard": good["shard"] | one} for one in forged_results(good["shard"])]
    for entry in [*forged, *(good | one for one in OTHERS)]:
        marker.write_text(json.dumps(entry))
        with pytest.raises(Refused, match="files are not there"):
            adapterkit.finish(file)
    adapterkit.run(file)
    assert adapterkit.finish(file, verify=True).data["parameters"] == expected


def forged_sums(good: dict) -> Iterator[dict]:
    for name in ("squares", "before", "lost", "moved"):
        yield from ({name: value} for value in (None, 1.0, "x", {}, [[]], ["x"], [-1.0], [True]))
    yield from ({"projection": value} for value in (None, "x", ["x"], [*good["projection"], 1.0]))
    yield from ({"delta": value} for value in ("x", -1.0, [], True))
    yield from ({"sampled": value} for value in (-1, 0.5, None, "x", True, 1 << 70))
    yield {"changed": good["sampled"] + 1}
    yield {"another": 1}


def test_forged_markers_of_parts(in_parts: Path):
    """Their sums are added up: what is none would end in a traceback, or in a receipt."""
    file = planned()
    for rank in ("0/2", "1/2"):
        adapterkit.run(file, rank=rank)
    markers = sorted(marks().glob(f"{WEIGHTS}@*.json"))
    assert len(markers) == 2
    tried = 0
    for marker in markers:
        text = marker.read_text()
        good = json.loads(text)
        shard = good["shard"]
        changed = [
            shard["metrics"] | {key: sums | one}
            for key, sums in [*shard["metrics"].items()][:1]
            for one in forged_sums(sums)
        ]
        forged = [good | {"shard": shard | {"metrics": one}} for one in changed]
        whole = {**shard["metrics"], "lm_head": {}}
        for more in ({"metrics": whole}, {"sha256": "0" * 64}, {"marks": None}, {"tensors": 1}):
            forged.append(good | {"shard": shard | more})
        for entry in forged:
            marker.write_text(json.dumps(entry))
            with pytest.raises(Refused, match="files are not there"):
                adapterkit.finish(file)
            tried += 1
        marker.write_text(text)
    assert tried > 60
    assert adapterkit.finish(file, verify=True).data["parameters"] == undisturbed()


@pytest.mark.parametrize("value", [math.inf, math.nan, 1e308, 1e-320])
def test_sums_of_parts_that_overflow_are_no_metrics(in_parts: Path, value: float):
    """Absurd weights have such sums: nothing is said of them."""
    file = planned()
    for rank in ("0/2", "1/2"):
        adapterkit.run(file, rank=rank)
    for marker in marks().glob(f"{WEIGHTS}@*.json"):
        entry = json.loads(marker.read_text())
        for sums in entry["shard"]["metrics"].values():
            for name in ("squares", "lost", "projection"):
                sums[name] = [value] * len(sums[name])
        marker.write_text(json.dumps(entry))
    if value == 1e308:
        with pytest.raises(Refused, match="does not fit together"):
            adapterkit.finish(file)
        return
    receipt = adapterkit.finish(file)
    json.dumps(receipt.data["parameters"], allow_nan=False)


@pytest.mark.parametrize("name", [
    "{file}@0-{more}", "{file}@00-{size}", "{file}@0-٣", "{file}@-0-{size}", "x@0-{size}",
    "{file}@0-{size}@0-{size}", "{file}@{size}-0", "config.json@0-{size}", "@0-{size}",
])  # fmt: skip
def test_markers_of_parts_that_there_are_none_of(work: Path, name: str):
    file = planned()
    adapterkit.run(file)
    marker = marks() / f"{WEIGHTS}.json"
    entry, done = json.loads(marker.read_text()), marks().parent / "out" / WEIGHTS
    size = done.stat().st_size
    part = name.format(file=WEIGHTS, size=size, more=size + 1)
    entry["shard"] |= {"file": part, "sha256": None, "marks": {}, "metrics": {}}
    (marks() / f"{part}.json").write_text(json.dumps(entry))
    marker.unlink()
    done.rename(done.with_name(part))
    with pytest.raises(Refused, match="files are not there"):
        adapterkit.finish(file)
    assert adapterkit.run(file).made == [WEIGHTS]
    adapterkit.finish(file, verify=True)
    assert sorted(path.name for path in Path("out").iterdir()) == sorted(
        ["README.md", WEIGHTS, "adapterkit.json", "config.json"]
    )


def test_forged_results_in_a_journal(work: Path):
    """Of a job that one process goes on with."""
    expected = undisturbed()
    planned()
    adapterkit.run("p.json")
    good = json.loads((marks() / f"{WEIGHTS}.json").read_text())["shard"]
    journal = Path(".out.adapterkit/journal.jsonl")
    head = json.loads(journal.read_bytes())
    del head["ranks"]
    stored = (marks().parent / "out" / WEIGHTS).read_bytes()
    for one in [*forged_results(good), {}]:
        Path(".out.adapterkit/out").mkdir(exist_ok=True)
        Path(".out.adapterkit/out", WEIGHTS).write_bytes(stored)
        forged = {"shard": good | one | ({} if one else {"sha256": "0" * 64})}
        journal.write_text(json.dumps(head) + "\n" + json.dumps(forged) + "\n")
        receipt = adapterkit.merge("base", ["adapter"], out="out", resume=True)
        is_kept = receipt.data["files"][WEIGHTS]["sha256"] == "0" * 64
        assert is_kept == (not one), one  # what is sound is believed, until it is verified
        assert receipt.data["parameters"] == expected
        Path("out").rename(f"out{len(list(work.iterdir()))}")
        Path(".out.adapterkit").mkdir()

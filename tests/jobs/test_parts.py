"""A file above a rank's fair share is made in parts: they are joined to the file, its hashes and
metrics that one process gives."""

import json
import signal

import pytest
import torch

import adapterkit
from adapterkit.core import execute
from adapterkit.core.checkpoint import disk
from adapterkit.core.engine import partition as pieces
from adapterkit.core.errors import Refused
from adapterkit.core.plan import Plan
from adapterkit.core.tasks import rows
from adapterkit.many.workers import ranges as rank_parts
from adapterkit.many.workers.ranges import tiling, units

SMALL = {"constants": {"many.workers.ranges.LEAST": 1000}}
slow = pytest.mark.slow
CPU = torch.device("cpu")


def small_pieces(large, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """The plan of the merge, in a process in which its file is cut into many pieces."""
    bench, _ = large
    monkeypatch.setattr(rank_parts, "LEAST", 1000)
    monkeypatch.setattr(pieces, "RUN", 512)
    monkeypatch.setattr(rows, "ELEMENTS", 128)
    out = bench.root / "never"
    return adapterkit.merge(bench.root / "base", bench.root / "adapter", out=out, dry_run=True)


@pytest.mark.parametrize("ranges, expected", [
    ([(0, 9)], [(0, 9)]),
    ([(0, 4), (4, 9)], [(0, 4), (4, 9)]),
    ([(0, 3), (0, 4), (3, 8), (4, 9)], [(0, 4), (4, 9)]),
    ([(0, 4), (5, 9)], None),
    ([(4, 9)], None),
    ([], None),
])  # fmt: skip
def test_which_parts_are_the_file(ranges, expected):
    assert tiling(ranges, 9) == expected


@pytest.mark.parametrize("ranks", [2, 3, 7, 1000])
def test_a_file_is_cut_between_pieces(large, monkeypatch, ranks: int):
    """All bytes once, in parts of about the same size."""
    plan = small_pieces(large, monkeypatch)
    assert units(plan.shards, 1, CPU) == list(plan.shards)
    parts = [unit for unit in units(plan.shards, ranks, CPU) if unit.range]
    size = plan.shards[0].size
    assert 2 <= len(parts) <= ranks and sum(part.size for part in parts) == size
    edges = [edge for part in parts for edge in part.range or ()]
    assert edges[0] == 0 and edges[-1] == size and edges[1:-1:2] == edges[2:-1:2]
    assert max(part.size for part in parts) <= size / min(ranks, 8) + 4096
    starts = [
        part.range[0] + piece.position
        for part in parts
        for piece in pieces.OpenShard(part, hashed=False).pieces(CPU)
    ]
    whole = pieces.OpenShard(plan.shards[0], hashed=False)
    assert starts == [piece.position for piece in whole.pieces(CPU)]
    monkeypatch.setattr(rank_parts, "MOST", 8000)
    parts = [unit for unit in units(plan.shards, ranks, CPU) if unit.range]
    assert sum(part.size for part in parts) == size
    assert max(part.size for part in parts) < 8000 + 4096


@pytest.mark.parametrize("ranks", [2, 5])
@pytest.mark.parametrize("killed", [False, True])
def test_the_bytes_of_one_process(large, ranks: int, killed: bool):
    bench, whole = large
    bench.clear()
    bench.plan().succeeded()
    fault = {"kill": True, "calls": ["fsync"], "when": 2} if killed else None
    ended = bench.worker(f"0/{ranks}", fault=fault, **SMALL)
    assert ended.status == (-signal.SIGKILL if killed else 0)
    pids = [bench.begin(f"{rank}/{ranks}", **SMALL) for rank in range(1, ranks)]
    for pid in pids:
        bench.wait(pid).succeeded()
    assert len(bench.marked()) == ranks
    assert all("@" in name for name in bench.marked())
    bench.finish().succeeded()
    bench.check_done(whole)


def test_another_number_of_ranks(large):
    """What there is counts where it is a whole part; then all is done."""
    bench, whole = large
    bench.clear()
    bench.plan().succeeded()
    fault = {"kill": True, "calls": ["fsync"], "when": 5}
    bench.worker("0/3", fault=fault, **SMALL)
    bench.finish().failed_cleanly("1 of 1 files are missing")
    bench.worker("1/4", **SMALL).succeeded()
    before = bench.marked()
    bench.worker("0/3", **SMALL).succeeded()
    bench.worker("0/1", **SMALL).succeeded()
    assert bench.marked() == before
    bench.finish().succeeded()
    bench.check_done(whole)


@pytest.mark.parametrize(
    "ranks, step", [(4, 83), pytest.param(4, 1, marks=[slow, pytest.mark.timeout(3600)])]
)
def test_the_join_is_killed_at_each_call(large, ranks: int, step: int):
    bench, whole = large
    for when in range(3, 400, step):
        bench.clear()
        bench.plan().succeeded()
        bench.worker(f"0/{ranks}", **SMALL).succeeded()
        ended = bench.finish(fault={"kill": True, "when": when})
        bench.finish().succeeded()
        bench.check_done(whole)
        if ended.status == 0:
            break
    assert when > 20


@pytest.mark.parametrize("more", [(), ("0/3", "1/2")])
@pytest.mark.parametrize("call, match, when", [
    ("rename", "@0-", 1), ("fsync", "/out/", 1), ("unlink", "/out/", 3),
])  # fmt: skip
def test_after_a_join_that_was_killed(large, call: str, match: str, when: int, more: tuple):
    """What is joined is a part; ranks of any number, which make others again, do no harm."""
    bench, whole = large
    bench.clear()
    bench.plan().succeeded()
    bench.worker("0/4", **SMALL).succeeded()
    fault = {"kill": True, "calls": [call], "match": match, "when": when}
    assert bench.finish(fault=fault).status == -signal.SIGKILL
    for rank in more:
        bench.worker(rank, **SMALL).succeeded()
    bench.finish().succeeded()
    bench.check_done(whole)


def test_a_join_goes_on_with_parts_that_are_cut_elsewhere(large):
    """What was copied beyond the end of one of them is cut off, and noted before."""
    bench, whole = large
    for calls in (["pwrite"], ["fsync"], ["rename"]):
        bench.clear()
        bench.plan().succeeded()
        bench.worker("0/4", **SMALL).succeeded()
        fault = {"kill": True, "calls": ["unlink"], "match": "/out/", "when": 4}
        assert bench.finish(fault=fault).status == -signal.SIGKILL
        *_, last = sorted(
            (bench.stage / "out").glob("*@*"), key=lambda path: int(path.name.rpartition("-")[2])
        )
        last.unlink()
        bench.finish().failed_cleanly("1 of 1 files are missing")
        bench.worker("0/3", **SMALL).succeeded()
        fault = {"kill": True, "calls": calls, "match": "/out/", "when": 1}
        assert bench.finish(fault=fault).status == -signal.SIGKILL
        bench.finish().succeeded()
        bench.check_done(whole)


def test_a_join_takes_the_room_of_one_part(large, monkeypatch):
    """Whenever bytes are made durable there are those of the file, and at most one part twice."""
    bench, whole = large
    bench.clear()
    bench.plan().succeeded()
    bench.worker("0/4", **SMALL).succeeded()
    folder, used, synced = bench.stage / "out", [], disk.sync

    def sync(descriptor: int) -> None:
        synced(descriptor)
        if folder.exists():
            used.append(sum(path.stat().st_size for path in folder.iterdir()))

    parts = [path.stat().st_size for path in folder.iterdir()]
    monkeypatch.setattr(disk, "sync", sync)
    adapterkit.finish(bench.file)
    assert len(parts) == 4 and min(used) == sum(parts)
    assert sum(parts) < max(used) <= sum(parts) + max(parts[1:])
    bench.check_done(whole)


def test_too_little_room_for_a_join(large, monkeypatch):
    """It is counted before anything is computed, and looked at again before anything is joined."""
    bench, whole = large
    bench.clear()
    size = (bench.root / "base" / "model-00001-of-00001.safetensors").stat().st_size
    monkeypatch.setattr(rank_parts, "LEAST", 1000)
    sources = (bench.root / "base", bench.root / "adapter")
    free = lambda size: monkeypatch.setattr(execute, "free_bytes", lambda path: size)
    free(size + (1 << 20))
    with pytest.raises(Refused, match="bytes free"):
        adapterkit.write_plan(bench.file, "merge", *sources, out=bench.out)
    assert not bench.file.exists() and not bench.control.exists()
    free(size + size // 2 + (2 << 20))
    plan = adapterkit.write_plan(bench.file, "merge", *sources, out=bench.out)
    totals = json.loads(bench.file.read_bytes())["totals"]
    assert totals == plan.totals()
    assert totals["disk_needed"] == totals["bytes_written"] + size // 2
    bench.worker("0/2", **SMALL).succeeded()
    before = bench.marked()
    free(size // 4)
    with pytest.raises(Refused, match="bytes free"):
        adapterkit.finish(bench.file)
    assert bench.marked() == before and len(before) == 2
    bench.finish().succeeded()
    bench.check_done(whole)

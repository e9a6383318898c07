"""A file above a rank's fair share is made in parts: they are joined to the file, its hashes and
metrics that one process gives."""

import signal

import pytest
import torch

import adapterkit
from adapterkit.engines import pieces, rank_parts
from adapterkit.engines.pieces import Part
from adapterkit.engines.rank_parts import tiling, units
from adapterkit.tasks import rows

SMALL = {"constants": {"rank_parts.LEAST": 1000}}
CPU = torch.device("cpu")


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
    bench, _ = large
    monkeypatch.setattr(rank_parts, "LEAST", 1000)
    monkeypatch.setattr(pieces, "RUN", 512)
    monkeypatch.setattr(rows, "ELEMENTS", 128)
    out = bench.root / "never"
    plan = adapterkit.merge(bench.root / "base", bench.root / "adapter", out=out, dry_run=True)
    assert units(plan, 1, CPU) == list(plan.shards)
    parts = [unit for unit in units(plan, ranks, CPU) if isinstance(unit, Part)]
    size = plan.shards[0].size
    assert 2 <= len(parts) <= ranks and sum(part.size for part in parts) == size
    edges = [edge for part in parts for edge in (part.start, part.stop)]
    assert edges[0] == 0 and edges[-1] == size and edges[1:-1:2] == edges[2:-1:2]
    assert max(part.size for part in parts) <= size / min(ranks, 8) + 4096


@pytest.mark.parametrize("ranks", [2, 5])
@pytest.mark.parametrize("killed", [False, True])
def test_the_bytes_of_one_process(large, ranks: int, killed: bool):
    bench, whole = large
    bench.clear()
    bench.plan().succeeded()
    fault = {"kill": True, "calls": ["fsync"], "when": 2} if killed else None
    ended = bench.rank(f"0/{ranks}", fault=fault, **SMALL)
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
    bench.rank("0/3", fault=fault, **SMALL)
    bench.finish().failed_cleanly("1 of 1 files are not there")
    bench.rank("1/4", **SMALL).succeeded()
    before = bench.marked()
    bench.rank("0/3", **SMALL).succeeded()
    bench.rank("0/1", **SMALL).succeeded()
    assert bench.marked() == before
    bench.finish().succeeded()
    bench.check_done(whole)


def test_the_join_is_killed_at_each_call(large):
    bench, whole = large
    for when in range(3, 400, 15):
        bench.clear()
        bench.plan().succeeded()
        bench.rank("0/2", **SMALL).succeeded()
        ended = bench.finish(fault={"kill": True, "when": when})
        bench.finish().succeeded()
        bench.check_done(whole)
        if ended.status == 0:
            break
    assert when > 20

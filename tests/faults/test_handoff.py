"""Outputs of packed weights, and factors that wait beside their file for the adapter's: killed at
any call, they resume to the same bytes, and nothing that waited is left."""

import itertools
import os
import random
import shutil
import signal
from collections.abc import Iterator

import pytest

from tests.faults.conftest import Driver

JOBS = {
    "loftq": ["loftq", "base", "--rank", "4", "--iterations", "2", "--double-quant"],
    "quantize": ["quantize", "base", "--to", "nf4", "--double-quant"],
}


@pytest.fixture(scope="module", params=JOBS)
def job(request, adapter_bench, inputs):
    bench = adapter_bench(JOBS[request.param])
    shutil.copytree(inputs / "base", bench.root / "base")
    return bench


@pytest.fixture(scope="module")
def whole(job) -> dict[str, str]:
    found = job.undisturbed()
    assert not [name for name in found if "handoff" in name or "part" in name]
    return found


@pytest.fixture(scope="module")
def loftq(adapter_bench, inputs):
    bench = adapter_bench(JOBS["loftq"])
    shutil.copytree(inputs / "base", bench.root / "base")
    return bench


@pytest.fixture(scope="module")
def lofted(loftq) -> dict[str, str]:
    return loftq.undisturbed()


@pytest.mark.parametrize("step", [197, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_each_call(job, whole, step: int) -> None:
    for when in itertools.count(random.Random(job.words[0]).randrange(step) + 1, step):
        job.clear()
        ended = job.merge(fault={"kill": True, "when": when})
        if ended.status == 0:
            break
        assert ended.status == -signal.SIGKILL
        assert not job.out.exists() or job.digests() == whole, ended.last
        job.merge("--resume").succeeded()
        job.check_done(whole)
    assert when > 60


@pytest.mark.parametrize(
    "match", ["00002-of-00003.safetensors.handoff", "adapter_model", "adapterkit.json"]
)
def test_killed_between_the_base_and_its_adapter(loftq, lofted, match: str) -> None:
    loftq.clear()
    assert loftq.merge(fault={"kill": True, "when": 1, "match": match}).status == -signal.SIGKILL
    waiting = {path.name for path in (loftq.control / "out" / "base").glob("*.handoff")}
    done = {path.name for path in (loftq.control / "out" / "base").glob("*.safetensors")}
    assert len(done) == (1 if "00002" in match else 3)
    if match == "adapter_model":
        assert waiting == {f"{name}.handoff" for name in done}
    before = {
        path.name: path.stat().st_ino
        for path in (loftq.control / "out" / "base").glob("*.safetensors")
    }
    loftq.merge("--resume").succeeded()
    loftq.check_done(lofted)
    after = {path.name: path.stat().st_ino for path in (loftq.out / "base").glob("*.safetensors")}
    assert {name: after[name] for name in before} == before  # not made again
    assert not list(loftq.out.rglob("*.handoff"))


@pytest.mark.parametrize("harm", ["removed", "cut"])
def test_what_waited_is_gone(loftq, lofted, harm: str) -> None:
    """TaskResult again with its file, or refused; never factors of something else."""
    loftq.clear()
    assert (
        loftq.merge(fault={"kill": True, "when": 1, "match": "adapter_model"}).status
        == -signal.SIGKILL
    )
    path = sorted((loftq.control / "out" / "base").glob("*.handoff"))[0]
    if harm == "removed":
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size // 2)
    ended = loftq.merge("--resume")
    if ended.status:
        ended.failed_cleanly()
        loftq.merge().succeeded()
    loftq.check_done(lofted)


@pytest.mark.parametrize("error", ["EIO", "ENOSPC"])
def test_the_nth_write_fails(job, whole, error: str) -> None:
    calls, step = ["pwrite", "write", "fallocate", "ftruncate", "fsync"], 127
    for when in itertools.count(random.Random(error).randrange(step) + 2, step):
        job.clear()
        ended = job.merge(
            fault={"calls": calls, "when": when, "error": error, "sticky": when % 2 == 0}
        )
        if ended.status == 0:
            break
        ended.failed_cleanly("check the disk" if error == "EIO" else "free some space")
        assert not job.out.exists() or job.digests() == whole
        job.merge("--resume").succeeded()
        job.check_done(whole)
    assert when > 31


@pytest.mark.parametrize("workers", [1, 8])
@pytest.mark.parametrize("fault", [None, {"calls": ["preadv", "pwrite"], "short": True}], ids=str)
def test_the_same_bytes_whatever_the_threads_and_reads(
    job, whole, workers: int, fault: dict | None
) -> None:
    job.clear()
    job.merge(fault=fault, workers=workers).succeeded()
    job.check_done(whole)

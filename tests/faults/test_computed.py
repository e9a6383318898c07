"""Outputs whose tensors are computed or packed, and factors that wait beside their file for the
adapter's: killed, failing and short at any call, they resume to the same bytes or leave nothing."""

import itertools
import os
import random
import signal

import pytest

from tests.faults.conftest import AdapterBench
from tests.support.usual import usual

JOBS = {
    "combine": "combine adapter other=0.5 --method ties --density 0.5",
    "resize": "resize adapter --max-size 4KB",  # all wait on disk until their ranks are settled
    "subtract": "subtract adapter other --general third --rank 2",  # two folders in one output
    "loftq": "loftq base --rank 4 --iterations 2 --double-quant",
    "quantize": "quantize base --to nf4 --double-quant",
}


def sweep(job: AdapterBench, whole: dict[str, str], step: int) -> int:
    """Die at every so many calls; how many calls a run makes."""
    for when in itertools.count(random.Random(str(job.words)).randrange(min(step, 40)) + 1, step):
        job.clear()
        ended = job.merge(fault={"kill": True, "when": when})
        if ended.status == 0:
            return ended.calls
        assert ended.status == -signal.SIGKILL, ended
        assert not job.out.exists() or job.digests() == whole, ended.last
        job.check_stage(whole)
        job.merge("--resume").succeeded()
        job.check_done(whole)


@pytest.mark.parametrize("step", [83, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", JOBS)
def test_killed_at_each_call(job_of, name: str, step: int):
    assert sweep(*job_of(JOBS[name]), step) > 60


def kill_before(job: AdapterBench, name: str) -> None:
    """Die before the fsync of this file: one thread finishes the files, so all earlier ones have
    their names. At its first write they may not have them yet."""
    fault = {"kill": True, "calls": ["fsync"], "match": name, "when": 1}
    assert job.merge(fault=fault).status == -signal.SIGKILL


@pytest.mark.parametrize(
    "match", ["00002-of-00003.safetensors.handoff", "adapter_model", "adapterkit.json"]
)
def test_killed_between_the_base_and_its_adapter(job_of, match: str):
    loftq, lofted = job_of(JOBS["loftq"])
    kill_before(loftq, match)
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
def test_a_lost_handoff_is_made_again_or_refused(job_of, harm: str):
    """Made again with its file, or refused; never factors of something else."""
    loftq, lofted = job_of(JOBS["loftq"])
    kill_before(loftq, "adapter_model")
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


@pytest.mark.parametrize("step", [47, pytest.param(1, marks=pytest.mark.slow)])
# every error of a merge: test_storage
@pytest.mark.parametrize("error", usual(["EIO", "ENOSPC"], {"EIO"}))
@pytest.mark.parametrize("name", JOBS)
def test_the_nth_write_fails(job_of, name: str, error: str, step: int):
    job, whole = job_of(JOBS[name])
    calls = ["pwrite", "write", "fallocate", "ftruncate", "fsync"]
    for when in itertools.count(random.Random(error).randrange(min(step, 16)) + 1, step):
        job.clear()
        ended = job.merge(
            fault={"calls": calls, "when": when, "error": error, "sticky": when % 2 == 0}
        )
        if ended.status == 0:
            break
        ended.failed_cleanly("check the disk" if error == "EIO" else "free some space")
        # the fsync after the last rename may be the one that fails
        assert not job.out.exists() or job.digests() == whole
        job.merge("--resume").succeeded()
        job.check_done(whole)
    assert when > 40


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow), 8])
@pytest.mark.parametrize(
    "fault",
    [
        None,
        {"calls": ["preadv", "pwrite"], "short": True},
        pytest.param({"calls": ["preadv"], "delay": 0.0005}, marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", JOBS)
def test_the_same_bytes_whatever_the_threads_and_reads(
    job_of, name: str, workers: int, fault: dict | None
):
    job, whole = job_of(JOBS[name])
    job.merge(fault=fault, workers=workers).succeeded()
    job.check_done(whole)

"""Outputs whose tensors are computed: killed, failing and short at any call, they resume to the
same bytes or leave nothing."""

import itertools
import random
import signal

import pytest

JOBS = {
    "combine": ["combine", "adapter", "other=0.5", "--method", "ties", "--density", "0.5"],
    "resize": [
        "resize",
        "adapter",
        "--max-size",
        "4KB",
    ],  # all wait on the disk until their ranks are settled
    "subtract": [
        "subtract",
        "adapter",
        "other",
        "--general",
        "third",
        "--rank",
        "2",
    ],  # two folders in one output
}


@pytest.fixture(scope="module", params=JOBS)
def job(request, adapter_bench):
    return adapter_bench(JOBS[request.param])


@pytest.fixture(scope="module")
def whole(job) -> dict[str, str]:
    return job.undisturbed()


@pytest.mark.parametrize("step", [47, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_each_call(job, whole, step: int):
    for when in itertools.count(random.Random(job.words[0]).randrange(step) + 1, step):
        job.clear()
        ended = job.merge(fault={"kill": True, "when": when})
        if ended.status == 0:
            break
        assert ended.status == -signal.SIGKILL
        assert not job.out.exists() or job.digests() == whole, ended.last
        job.check_stage(whole)
        job.merge("--resume").succeeded()
        job.check_done(whole)
    assert when > 30


@pytest.mark.parametrize("error", ["EIO", "ENOSPC"])
@pytest.mark.parametrize("step", [37, pytest.param(1, marks=pytest.mark.slow)])
def test_the_nth_write_fails(job, whole, error: str, step: int):
    calls = ["pwrite", "write", "fallocate", "ftruncate", "fsync"]
    for when in itertools.count(random.Random(error).randrange(step) + 1, step):
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
    assert when > 7


@pytest.mark.parametrize("workers", [1, 2, 8])
@pytest.mark.parametrize(
    "fault",
    [None, {"calls": ["preadv", "pwrite"], "short": True}, {"calls": ["preadv"], "delay": 0.0005}],
    ids=str,
)
def test_the_same_bytes_whatever_the_threads_and_reads(
    job, whole, workers: int, fault: dict | None
):
    job.clear()
    job.merge(fault=fault, workers=workers).succeeded()
    job.check_done(whole)

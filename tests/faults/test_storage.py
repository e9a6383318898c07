"""Storage that fails or lies: a message, status 1, no final name that is not complete."""

import itertools
import random
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from tests.support.faults import WRITING, check_failure


@pytest.mark.parametrize("error", ["EIO", "ENOSPC", "EDQUOT"])
@pytest.mark.parametrize("step", [53, pytest.param(1, marks=pytest.mark.slow)])
def test_the_nth_write_fails(shared, whole, error: str, step: int):
    """Once, or from then on (a disk that is full stays full)."""
    words = {"EIO": "check the disk", "ENOSPC": "free some space", "EDQUOT": "of your quota"}
    for when in itertools.count(random.Random(error).randrange(step) + 1, step):
        shared.clear()
        ended = shared.merge(
            fault={"calls": WRITING, "when": when, "error": error, "sticky": when % 2 == 0}
        )
        if ended.status == 0:
            break
        assert ended.seconds < 10
        check_failure(shared, whole, words[error], ended=ended)
    # an EIO of copy_file_range alone is no failure: the bytes are then read and written
    assert when > 10 or error == "EIO"
    shared.check_done(whole)


@pytest.mark.parametrize("error", ["EIO", pytest.param("ENOSPC", marks=pytest.mark.slow)])
def test_each_small_thing_fails(shared, whole, error: str):
    """Names and folders: mkdir, open, rename, link, journal."""
    calls = ["open", "mkdir", "rename", "link"]
    for when in itertools.count(1):
        shared.clear()
        ended = shared.merge(fault={"calls": calls, "when": when, "error": error})
        if ended.status == 0:
            # hard links have a substitute
            if "link" in ended.last or ended.calls >= when:
                continue
            break
        check_failure(shared, whole, "cannot write", ended=ended)
    assert when > 15


@pytest.mark.parametrize("call", ["fsync", "close"])
def test_a_failing_fsync_is_final(shared, whole, call: str):
    """Never tried again (the kernel reports once and forgets), and the file never gets its name."""
    failed = 0
    for when in itertools.count(1):
        shared.clear()
        fault = {"calls": [call], "when": when, "error": "EIO"}
        ended = shared.merge(fault=fault)
        if ended.status == 0 and ended.calls < when:
            break
        if ended.status == 0:  # lock and journal are closed when nothing depends on it any more
            assert call == "close"
            continue
        failed += 1
        if ".part" in ended.last:
            part = Path(ended.last.partition(" ")[2])
            assert not part.with_suffix("").exists()
        ended.failed_cleanly("Input/output error")
        # the last one is of the folder that holds the output
        assert not shared.out.exists() or shared.digests() == whole
        shared.merge("--resume").succeeded()
        shared.check_done(whole)
    assert failed >= 10


def test_a_shard_is_synced_once(shared):
    shared.clear()
    fault = {"calls": ["fsync"], "match": "00002-of", "when": 1, "error": "EIO"}
    ended = shared.merge(fault=fault)
    ended.failed_cleanly("model-00002-of-00003.safetensors.part: cannot write: Input/output error")
    assert ended.calls == 1


@pytest.mark.parametrize("call", ["pwrite", "write", "copy_file_range", "preadv"])
def test_short_reads_and_writes(shared, whole, call: str):
    shared.clear()
    ended = shared.merge(fault={"calls": [call], "short": True})
    ended.succeeded()
    assert ended.calls > 10
    shared.check_done(whole)


@pytest.mark.parametrize("answer", ["zero", "EXDEV", "ENOSYS", "EINVAL", "EOPNOTSUPP", "EIO"])
@pytest.mark.parametrize("when", [0, 2])
def test_without_copy_file_range(shared, whole, answer: str, when: int):
    """The bytes are the same when the kernel cannot copy, or stops after a while."""
    shared.clear()
    fault = {"calls": ["copy_file_range"], "when": when, "sticky": True}
    ended = shared.merge(fault=fault | ({"zero": True} if answer == "zero" else {"error": answer}))
    ended.succeeded()
    assert ended.calls > 2
    shared.check_done(whole)


@pytest.mark.parametrize("call", ["fallocate", "sync_file_range", "link"])
@pytest.mark.parametrize("error", ["ENOSYS", "EOPNOTSUPP", "EINVAL"])
def test_without_other_calls(shared, whole, call: str, error: str):
    shared.clear()
    shared.merge(fault={"calls": [call], "error": error}).succeeded()
    shared.check_done(whole)


def test_a_write_of_nothing(shared, whole):
    shared.clear()
    check_failure(
        shared,
        whole,
        "nothing was written",
        ended=shared.merge(fault={"calls": ["pwrite"], "zero": True, "when": 4}),
    )


@pytest.mark.parametrize("call", ["pwrite", "copy_file_range"])
@pytest.mark.parametrize("step", [17, pytest.param(1, marks=pytest.mark.slow)])
def test_lost_writes_are_found(shared, whole, call: str, step: int):
    """A write that is acknowledged and lost: --verify finds it before the output gets its name,
    `verify` finds it later."""
    for when in itertools.count(1, step):
        fault = {"calls": [call], "lost": True, "when": when}
        shared.clear()
        ended = shared.merge("--verify", fault=fault)
        if ended.status == 0:
            break
        ended.failed_cleanly("model-0000")
        assert (
            "bytes that are not those" in ended.stderr or "not a safetensors file" in ended.stderr
        )
        assert not shared.out.exists()
        shared.merge().succeeded()  # nothing of it is used again
        shared.check_done(whole)
        shared.clear()
        shared.merge(fault=fault).succeeded()
        shared.run(["verify", str(shared.out)]).failed_cleanly("model-0000")
    assert when > step


@pytest.mark.parametrize("limit", [2000, 5000, 20000])
def test_a_limit_on_the_size_of_files(shared, whole, limit: int):
    shared.clear()
    ended = shared.merge(limits={"FSIZE": limit})
    if limit == 20000:
        ended.succeeded()
    else:
        check_failure(shared, whole, "File too large", "--max-shard-size", ended=ended)


def test_interrupted_system_calls(shared, whole):
    """EINTR, by strace: Python and we go on."""
    program = shutil.which("strace")
    if program is None:
        pytest.skip("needs strace")
    calls = "pwrite64,write,copy_file_range,fsync,preadv,fallocate,ftruncate"
    shared.clear()
    pid = shared.start(shared.argv(), held=True)
    options = ["-e", f"trace={calls}", "-e", f"inject={calls}:error=EINTR:when=2+3"]
    tracer = subprocess.Popen(
        [program, "-f", "-qq", "-o", str(shared.root / "trace"), "-p", str(pid), *options],
        stderr=subprocess.DEVNULL,
    )
    while "TracerPid:\t0\n" in Path(f"/proc/{pid}/status").read_text() and tracer.poll() is None:
        time.sleep(0.01)
    attached = tracer.poll() is None
    shared.driver.ask(release=pid)
    ended = shared.wait(pid)
    if not attached:
        pytest.skip("strace cannot attach to processes here")
    tracer.wait()
    assert (shared.root / "trace").read_text().count("(INJECTED)") > 10
    (shared.root / "trace").unlink()
    ended.succeeded()
    shared.check_done(whole)

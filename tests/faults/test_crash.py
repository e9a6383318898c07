"""Killed at any moment, a merge leaves no final name that is not whole, and `--resume` ends where
an undisturbed run does.

The sweeps die before the N-th system call that writes (and halfway through the N-th write), for
every N; by default every few N from a start that differs from sweep to sweep, with `-m slow` all of
them: pytest tests/faults -m slow
"""

import itertools
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from adapterkit.core.output.journal import entries_of, read_lines
from tests.support.forks import program

SYSTEM_CALLS = [
    "pwrite64", "copy_file_range", "ftruncate", "fallocate", "fsync", "rename|renameat|renameat2",
    "unlink|unlinkat|rmdir", "mkdir|mkdirat", "link|linkat", "write",
]  # fmt: skip
PLACES = [
    "tokenizer",
    "index.json",
    "config.json",
    "00001",
    "00002",
    "00003",
    "journal",
    "lock",
    "adapterkit.json",
]


def check_and_resume(bench, whole, older, options=()):
    """The invariant after a crash, and that a resumed run restores it. An older output needs
    --overwrite again only if the crash came before anything was noted."""
    found = bench.digests() if bench.out.exists() else None
    assert found in (None, whole, older)
    if found != whole:
        bench.check_stage(whole)
    begun = bench.begun()
    if not begun and found not in (None, whole):
        bench.merge("--resume").failed_cleanly("options.weights.0 differs")
    bench.merge("--resume", *(() if begun else options)).succeeded()
    bench.check_done(whole)


def sweep(bench, whole, older, fault: dict, step: int, *options: str) -> int:
    """Die at the calls first, first + step, ... until a run comes through; how many calls one
    makes."""
    kept = bench.root / "kept"
    if options and not kept.exists():
        bench.clear()
        bench.merge(weight="0.5").succeeded()
        shutil.copytree(bench.out, kept)
    for when in itertools.count(random.Random(str(fault)).randrange(step) + 1, step):
        bench.clear()
        if options:
            shutil.copytree(kept, bench.out)
        ended = bench.merge(*options, fault=fault | {"when": when})
        if ended.status == 0:
            bench.check_done(whole)
            return ended.calls
        assert ended.status == -signal.SIGKILL, ended
        try:
            check_and_resume(bench, whole, older, options)
        except AssertionError as error:
            raise AssertionError(f"killed at call {when}, {ended.last}") from error


@pytest.mark.parametrize("step", [41, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("how", ["kill", "torn"])
def test_killed_at_each_call(shared, whole, how: str, step: int):
    calls = {"torn": {"calls": ["pwrite", "write"]}, "kill": {}}[how]
    assert sweep(shared, whole, None, {how: True} | calls, step) > (20 if calls else 100)


@pytest.mark.parametrize("step", [67, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_while_an_older_output_is_replaced(shared, whole, older, step: int):
    assert sweep(shared, whole, older, {"kill": True}, step, "--overwrite") > 100


@pytest.mark.parametrize("step", [11, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_where_folders_cannot_be_exchanged(shared, whole, older, step: int):
    """Then the older output is moved away first: a moment with no output, never a mixed one."""
    calls = ["rename", "rmdir", "unlink"]
    fault = {"kill": True, "calls": calls, "also": {"calls": ["renameat2"], "error": "EINVAL"}}
    assert sweep(shared, whole, older, fault, step, "--overwrite") > 10


@pytest.mark.parametrize("points", [8, pytest.param(150, marks=pytest.mark.slow)])
@pytest.mark.parametrize("options", [(), ("--overwrite",)])
def test_killed_at_random_times(shared, whole, older, points: int, options: tuple):
    generator, died, times = random.Random(len(options)), 0, []
    # one alone may be slow on a loaded machine, and then nothing is killed in time
    for _ in range(3):
        shared.clear()
        times.append(shared.merge().seconds)
    whole_time = min(times)
    for number in range(10 * points):
        if number >= points and died > points // 3:
            break
        shared.clear()
        if options:
            shared.merge(weight="0.5").succeeded()
        pid = shared.start(shared.argv(*options))
        time.sleep(generator.uniform(0.0, whole_time))
        os.kill(pid, signal.SIGKILL)
        if shared.wait(pid).status == 0:
            whole_time *= 0.7  # the machine is less loaded than when it was measured
        else:
            died += 1
        check_and_resume(shared, whole, older if options else None, options)
    assert died > points // 3


def test_killed_with_the_lock_of_all_bars(shared, whole):
    """tqdm's own is one for all processes that were forked after it was made."""
    shared.clear()
    shared.merge("--dry-run").succeeded()
    holds = "from tqdm import tqdm; tqdm.get_lock().acquire(); import os; os.kill(os.getpid(), 9)"
    assert program(holds, shared.root).returncode == -signal.SIGKILL
    shared.merge().succeeded()
    shared.check_done(whole)


def test_killed_again_and_again(shared, whole):
    """Each run dies a little later than the one before; every one resumes."""
    shared.clear()
    for when in range(1, 400, 7):
        ended = shared.merge("--resume", fault={"kill": True, "when": when})
        if ended.status == 0:
            break
    shared.check_done(whole)


def test_a_stage_without_its_names_is_only_published(shared, whole):
    """Everything was written, the rename was not: a resumed run writes nothing again."""
    shared.clear()
    ended = shared.merge(fault={"kill": True, "calls": ["rename"], "when": 4})
    assert ended.status == -signal.SIGKILL and ended.last.endswith(".adapterkit/out")
    *_, (_, last) = entries_of(read_lines(shared.control / "journal.jsonl"))
    assert "publish" in last
    ended = shared.merge(
        "--resume", fault={"calls": ["pwrite", "open"], "match": ".adapterkit/out/", "when": -1}
    )
    ended.succeeded()
    assert ended.calls == 0
    shared.check_done(whole)


def test_finished_shards_are_not_written_again(shared, whole):
    shared.clear()
    ended = shared.merge(fault={"kill": True, "calls": ["rename"], "when": 3}, workers=1)
    assert ended.last.endswith("model-00003-of-00003.safetensors.part")
    ended = shared.merge("--resume", fault={"calls": ["fallocate"], "when": -1})
    ended.succeeded()
    assert ended.calls == 1
    shared.check_done(whole)


# -- real system calls -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def strace(shared) -> str:
    program = shutil.which("strace")
    if program is None:
        pytest.skip("needs strace")
    shared.clear()
    pid = shared.start(shared.argv(), held=True)
    tracer = traced(program, pid, "-e", "trace=fsync")
    shared.driver.ask(release=pid)
    ended = shared.wait(pid)
    if tracer is None:
        pytest.skip("strace cannot attach to processes here")
    tracer.wait()
    ended.succeeded()
    return program


def traced(program: str, pid: int, *options: str) -> subprocess.Popen | None:
    """strace attached to a process that waits, or None where that is not allowed."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    tracer = subprocess.Popen(
        [program, "-f", "-qq", "-o", "/dev/null", "-p", str(pid), *options], **quiet
    )
    for _ in range(500):
        status = Path(f"/proc/{pid}/status").read_text()
        if "TracerPid:\t0\n" not in status:
            return tracer
        if tracer.poll() is not None:
            return None
        time.sleep(0.01)
    tracer.kill()
    return None


FEW = [(call, 6) for call in SYSTEM_CALLS[:6:2]]
ALL = [pytest.param(call, 1, marks=pytest.mark.slow) for call in SYSTEM_CALLS] + [
    pytest.param("openat", 5, marks=pytest.mark.slow)
]


@pytest.mark.parametrize(("call", "step"), FEW + ALL)
def test_killed_by_the_kernel(shared, strace, whole, older, call: str, step: int):
    """SIGKILL put in at the N-th system call of a thread (strace counts them thread by thread)."""
    shared.clear()
    shared.merge(weight="0.5").succeeded()
    kept = shared.root / "older"
    shutil.rmtree(kept, ignore_errors=True)
    shared.out.rename(kept)
    for when in range(1, 400, step):
        shared.clear()
        replace = when % 2 == 0
        if replace:
            shutil.copytree(kept, shared.out)
        options = ("--overwrite",) if replace else ()
        pid = shared.start(shared.argv(*options), held=True)
        name = f"/^({call})$"
        tracer = traced(
            strace, pid, "-e", f"trace={name}", "-e", f"inject={name}:signal=SIGKILL:when={when}"
        )
        shared.driver.ask(release=pid)
        ended = shared.wait(pid)
        tracer.wait()
        if ended.status == 0:
            shared.check_done(whole)
            break
        assert ended.status == -signal.SIGKILL, ended
        check_and_resume(shared, whole, older, options)
    else:
        raise AssertionError("no run came through")
    assert when > 1  # at least one was killed


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_killed_by_the_kernel_at_one_file(shared, whole, place: str):
    """Calls on one file alone, whichever thread makes them."""
    for when in itertools.count(1):
        shared.clear()
        ended = shared.merge(fault={"kill": True, "match": place, "when": when})
        if ended.status == 0:
            break
        check_and_resume(shared, whole, None)
    assert when > 3

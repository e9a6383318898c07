"""Ctrl-C and SIGTERM: once, and the run stops within two seconds with the command that goes on;
twice, and it is gone."""

import contextlib
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.forks import ENVIRONMENT, Ended

SLOW = {"calls": ["pwrite", "copy_file_range"], "delay": 0.15}
LONG = 40.0  # seconds of a call or a wait that an interrupt ends
SIGNALS = [signal.SIGINT, signal.SIGTERM]


def started(bench, *options: str, fault: dict = SLOW, **settings) -> int:
    """A run that is at work: it is in one of these calls."""
    mark = bench.root / "mark"
    mark.unlink(missing_ok=True)
    act = {"act": [["mark", str(mark)]]}
    pid = bench.start(bench.argv(*options), fault=fault | act, **settings)
    while not (mark.exists() and bench.begun()):
        assert is_alive(pid)
        time.sleep(0.005)
    return pid


def is_alive(pid: int) -> bool:
    return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()


def ended_soon(bench, *options: str, number: int, **settings) -> Ended:
    """The end of a run, which comes within two seconds after one signal."""
    pid = started(bench, *options, **settings)
    began = time.monotonic()
    os.kill(pid, number)
    ended = bench.wait(pid)
    assert time.monotonic() - began < 2
    return ended


def command_in(text: str) -> list[str]:
    """The command that a message names, as a shell would cut it into words."""
    words = shlex.split(
        next(line for line in text.splitlines() if line.startswith("  adapterkit "))
    )
    return words[1:]


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("options", [(), ("--overwrite",)])
def test_one_signal_ends_a_job_soon_and_leaves_it_resumable(
    shared, whole, number: int, options: tuple
):
    shared.clear()
    if options:
        shared.merge(weight="0.5").succeeded()
        older = shared.digests()
    ended = ended_soon(shared, *options, number=number, fault=SLOW | {"when": 5, "sticky": True})
    ended.failed_cleanly("stopped; finished shards are kept", "--resume")
    assert shared.digests() == older if options else not shared.out.exists()
    shared.check_stage(whole)
    shared.run(command_in(ended.stderr)).succeeded()
    shared.check_done(whole)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_second_signal_ends_a_job_at_once(shared, whole, number: int):
    """The second one does not wait for threads that wait for the disk."""
    shared.clear()
    patient = {"core.engine.file_threads.SHUTDOWN_TIMEOUT": LONG}
    pid = started(shared, fault=SLOW | {"delay": LONG}, workers=1, constants=patient)
    os.kill(pid, number)
    while is_pending(pid, number):
        time.sleep(0.005)
    time.sleep(0.2)  # Python's handler follows the system's
    assert is_alive(pid)
    began = time.monotonic()
    os.kill(pid, number)
    ended = shared.wait(pid)
    assert time.monotonic() - began < 0.4
    ended.failed_cleanly("stopped at once")
    shared.merge("--resume").succeeded()
    shared.check_done(whole)


def is_pending(pid: int, number: int) -> bool:
    """Whether the process has a signal that no thread of it has got."""
    status = Path(f"/proc/{pid}/status").read_text()
    words = dict(line.split(":\t", 1) for line in status.splitlines())
    return any(int(words[name], 16) >> (number - 1) & 1 for name in ("SigPnd", "ShdPnd"))


def test_twice_in_a_moment(shared, whole):
    """The second one comes while the first is being answered."""
    for gap in (0, 0.001, 0.003, 0.01, 0.03, 0.1):
        shared.clear()
        pid = started(shared)
        os.kill(pid, signal.SIGINT)
        time.sleep(gap)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGINT)
        shared.wait(pid).failed_cleanly("stopped")
        shared.merge("--resume").succeeded()
        shared.check_done(whole)


@pytest.mark.parametrize("call", ["fsync", "fallocate", "pwrite"])
def test_once_while_the_disk_is_slow(shared, whole, call: str):
    """A call that takes long does not hold up who interrupts."""
    shared.clear()
    place = "" if call == "fallocate" else ".part"
    fault = {"calls": [call], "match": place, "delay": LONG}
    ended = ended_soon(shared, number=signal.SIGINT, fault=fault, workers=1)
    ended.failed_cleanly("--resume")
    shared.merge("--resume").succeeded()
    shared.check_done(whole)


def test_paths_that_a_shell_would_cut(shared, whole):
    """The command in the message is quoted."""
    shared.clear()
    kept = shared.out
    shared.out = shared.root / "out of $HOME; it's"
    try:
        pid = started(shared)
        os.kill(pid, signal.SIGINT)
        ended = shared.wait(pid)
        ended.failed_cleanly("--resume")
        assert command_in(ended.stderr) == [*shared.argv(), "--resume"]
        shared.run(command_in(ended.stderr)).succeeded()
        shared.check_done(whole)
    finally:
        shared.clear()
        shared.out = kept


@pytest.mark.parametrize("points", [8, pytest.param(150, marks=pytest.mark.slow)])
def test_signals_at_random_times_leave_jobs_resumable(shared, whole, points: int):
    """Whenever it comes, planning and publishing included: a message and a whole output or none."""
    generator = random.Random(points)
    stopped = 0
    for number in range(10 * points):
        if number >= points and stopped > points // 4:
            break
        shared.clear()
        pid = shared.start(
            shared.argv(), fault={"calls": ["fsync", "open", "rename"], "delay": 0.002}
        )
        time.sleep(generator.uniform(0.02, 0.25))
        os.kill(pid, generator.choice(SIGNALS))
        ended = shared.wait(pid)
        # before the command begins, the system's own way of dying
        assert ended.status in (0, 1, -signal.SIGTERM, -signal.SIGINT), ended
        assert "Traceback" not in ended.stderr, ended.stderr
        if ended.status == 1:
            stopped += 1
            assert "stopped" in ended.stderr, ended.stderr
        if shared.out.exists():
            assert shared.digests() == whole
        shared.merge("--resume").succeeded()
        shared.check_done(whole)
    assert stopped > points // 4


@pytest.mark.parametrize(
    "delay",
    [
        0.0,
        0.3,
        pytest.param(0.6, marks=pytest.mark.slow),
        pytest.param(1.0, marks=pytest.mark.slow),
    ],
)
def test_a_real_process_while_it_imports(bench, delay: float):
    """Importing torch takes a second or more; an interrupt in it is one too, as soon as a library
    is loaded."""
    argv = [sys.executable, "-m", "adapterkit", *bench.argv()]
    process = subprocess.Popen(argv, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    while (
        process.poll() is None and "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text()
    ):
        time.sleep(0.005)
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    _, text = process.communicate(timeout=60)
    assert time.monotonic() - began < 10
    if process.returncode != 0:  # it may have been faster
        assert process.returncode == 1, text
        assert text.startswith("Error: stopped") and "Traceback" not in text
        assert not bench.out.exists()


WHILE_PRINTING = """
import os, signal, sys
from adapterkit.cli import output, process

print_receipt = output.print_receipt

def interrupted(receipt):
    os.kill(os.getpid(), signal.SIGINT)
    print_receipt(receipt)

output.print_receipt = interrupted
process()
"""


def test_a_signal_after_publishing_changes_nothing(llama, lora, tmp_path):
    words = ["merge", str(llama), str(lora), "--out", str(tmp_path / "out")]
    ended = subprocess.run(
        [sys.executable, "-c", WHILE_PRINTING, *words], capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 0 and "tensors changed" in ended.stderr, ended
    assert (tmp_path / "out" / "adapterkit.json").is_file()


WHILE_FREEING = """
import os, signal, time, weakref
from adapterkit.core import execute
from adapterkit.cli import process

class Thing:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)

def generator():
    try:
        yield
    finally:
        time.sleep(0.1)

def freeing(*args):
    thing, ended = Thing(), generator()
    callback = weakref.ref(thing, lambda _: time.sleep(0.1))
    next(ended)
    del thing  # raised in the callback or the finalizer, and again in the other
    del ended  # again
    check_space(*args)
    time.sleep(5)  # and here

check_space, execute.check_space = execute.check_space, freeing
process()
"""


def test_an_interrupt_that_python_drops(llama, lora, tmp_path):
    """Where an object is freed an exception cannot leave: it is raised again, until it can."""
    words = ["merge", str(llama), str(lora), "--out", str(tmp_path / "out")]
    ended = subprocess.run(
        [sys.executable, "-c", WHILE_FREEING, *words], capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 1 and not (tmp_path / "out").exists(), ended
    assert ended.stderr.startswith("Error: ") and "stopped; finished shards" in ended.stderr
    assert command_in(ended.stderr) == [*words, "--resume"]

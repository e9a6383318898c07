"""Several processes on one output; locks of processes that are gone."""

import os
import subprocess
import sys
import time

import pytest

from adapterkit.checkpoint.output.lock import Lock
from adapterkit.errors import Refused
from tests.support.faults import root


def test_a_second_process_is_refused(shared, whole):
    shared.clear()
    pid = shared.start(shared.argv(), fault={"calls": ["pwrite"], "delay": 0.4})
    while not shared.begun():
        time.sleep(0.005)
    for more in (("--resume",), ("--overwrite",)):
        shared.merge(*more).failed_cleanly("another process is at work there", str(pid))
    shared.merge().failed_cleanly("was interrupted")
    shared.wait(pid).succeeded()
    shared.check_done(whole)


def test_many_processes_one_output(shared, whole):
    """Started together over the lock of a dead one: one does the job, the others are refused or
    find it done."""
    for _ in range(3):
        shared.clear()
        shared.merge(fault={"kill": True, "calls": ["rename"], "when": 2})
        assert (shared.control / "lock").exists()
        pids = [shared.start(shared.argv("--resume"), held=True) for _ in range(6)]
        for pid in pids:
            shared.driver.ask(release=pid)
        ends = [shared.wait(pid) for pid in pids]
        assert any(e.status == 0 for e in ends)
        for ended in ends:
            if ended.status:
                ended.failed_cleanly("another process is at work there")
        shared.check_done(whole)


@pytest.mark.parametrize(
    "holder", ["", "garbage", "{host} {pid}", "{host} {me} 0:1", "{host} 999999999 boot:5"]
)
def test_stale_locks(shared, whole, holder: str):
    """Torn, of another age, or of a process whose number lives on in another (containers begin at 1
    again)."""
    shared.clear()
    shared.merge(fault={"kill": True, "calls": ["rename"], "when": 2})
    text = holder.format(host=os.uname().nodename, pid=os.getpid(), me=os.getpid())
    (shared.control / "lock").write_text(text)
    shared.merge("--resume").succeeded()
    shared.check_done(whole)


def test_a_lock_of_another_host(shared):
    shared.clear()
    shared.merge(fault={"kill": True, "calls": ["rename"], "when": 2})
    (shared.control / "lock").write_text("elsewhere 17 boot:5")
    shared.merge("--resume").failed_cleanly("(elsewhere 17)", "remove the file lock")
    (shared.control / "lock").unlink()
    shared.merge("--resume").succeeded()


@root
def test_the_lock_of_a_killed_container(tmp_path):
    """Of a process in another PID namespace on a host of the same name."""
    isolated = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
    if subprocess.run([*isolated, "true"], capture_output=True).returncode:
        pytest.skip("no PID namespaces here")
    hold = (
        "import sys, time; from pathlib import Path\n"
        "from adapterkit.checkpoint.output.lock import Lock\n"
        "Lock(Path(sys.argv[1])).acquire(); print('locked', flush=True); time.sleep(60)"
    )
    command = [*isolated, sys.executable, "-c", hold, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process, process.stdout:
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(Refused, match="another process is at work there"):
            Lock(tmp_path).acquire()
        process.kill()
        process.wait()
        lock, until = Lock(tmp_path), time.monotonic() + 10
        while True:
            try:
                lock.acquire()
                break
            except Refused:  # the kernel is still ending the processes of the namespace
                assert time.monotonic() < until
                time.sleep(0.01)
        lock.release()
    assert not list(tmp_path.iterdir())

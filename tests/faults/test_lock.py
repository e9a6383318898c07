"""Several processes on one output; locks of processes that are gone."""

import os
import re
import subprocess
import sys
import time

import pytest

import adapterkit
from adapterkit.core.errors import Refused
from adapterkit.core.output.folder_output import FolderOutput
from adapterkit.core.output.journal import line_of
from adapterkit.core.output.lock import Lock
from adapterkit.core.output.resume import state_of
from adapterkit.core.output.stage import JOURNAL, Stage
from adapterkit.many.workflows.workflow import run_pipeline
from tests.support.faults import root

WRITES = "another run writes this output now"


def test_a_second_process_is_refused(shared, whole):
    shared.clear()
    with shared.held("pwrite") as pid:
        for more in ((), ("--resume",), ("--overwrite",)):
            shared.merge(*more).failed_cleanly(WRITES, f"(process {pid} since 20")
    shared.wait(pid).succeeded()
    shared.check_done(whole)


@pytest.mark.parametrize("more", [{}, {"dtype": "fp16"}, {"dry_run": True}], ids=str)
def test_a_second_run_is_refused_for_the_running_one_and_not_for_an_interruption(
    more, llama, lora, tmp_path
):
    """The second begins while the first writes, and holds it up until it is refused."""
    out, refused = tmp_path / "out", list[str]()

    def second(done):
        if not refused:
            try:
                adapterkit.merge(llama, lora, out=out, **more)
            except Refused as error:
                refused.append(str(error))

    adapterkit.merge(llama, lora, out=out, progress=second)
    since = rf"\(process {os.getpid()} since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d\)"
    assert re.search(f"{WRITES} {since}", refused[0]), refused
    assert adapterkit.verify(out)["files"]


def test_a_step_of_a_pipeline_is_refused_for_a_running_one(llama, lora, tmp_path):
    file, out, rows = tmp_path / "steps.toml", tmp_path / "out", list[dict]()
    file.write_text(
        f'[[step]]\nverb = "merge"\ninputs = ["{llama}", "{lora}"]\n'
        'options = { dtype = "fp16" }\nout = "out"\n'
    )

    def second(done):
        if not rows:
            rows.extend(run_pipeline(file)["steps"])

    adapterkit.merge(llama, lora, out=out, progress=second)
    assert rows[0]["state"] == "refused" and WRITES in str(rows[0]), rows


def test_a_run_that_ends_while_the_next_one_looks_is_no_interrupted_one(tmp_path, monkeypatch):
    """The journal is there when it is read first, and its run has ended when the lock is."""
    stage = Stage(FolderOutput(tmp_path / "out"))
    stage.control.mkdir()
    (stage.control / JOURNAL).write_bytes(line_of({"fingerprint": "one", "recipe": {}}))
    checks = iter([lambda: None, (stage.control / JOURNAL).unlink])
    monkeypatch.setattr(stage.lock, "check", lambda: next(checks)())
    assert state_of(stage, "two", resume=False, overwrite=False) == "fresh"


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
                ended.failed_cleanly(WRITES)
        shared.check_done(whole)


@pytest.mark.parametrize(
    "holder", ["", "garbage", "{host} {pid}", "{host} {me} 0:1", "{host} 999999999 boot:5"]
)
def test_a_stale_lock_is_taken_over(shared, whole, holder: str):
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
    shared.merge("--resume").failed_cleanly(
        "(process 17 on elsewhere since 20", "remove the file lock"
    )
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
        "from adapterkit.core.output.lock import Lock\n"
        "Lock(Path(sys.argv[1])).acquire(); print('locked', flush=True); time.sleep(60)"
    )
    command = [*isolated, sys.executable, "-c", hold, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process, process.stdout:
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(Refused, match=WRITES):
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

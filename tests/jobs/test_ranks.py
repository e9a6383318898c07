"""However many processes make an output, and whatever happens to them, it is the one that a single
process makes."""

import itertools
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from adapterkit.core.output.journal import line_of, read_entry
from tests.jobs.conftest import JOBS
from tests.support.usual import usual

SYSTEMS = ["linux", "windows"]
SLOW = [pytest.mark.slow, pytest.mark.timeout(3600)]
# planning from the headers takes longest: of those that build the model's skeleton, two ranks
USUAL = {("merge", 1), ("merge", 5), ("init", 2), ("loftq", 2), ("combine", 2)}
MATRIX = [
    *usual(
        ((job, ranks, "linux") for job in JOBS for ranks in (1, 2, 5)), lambda row: row[:2] in USUAL
    ),
    *usual(((job, 2, "windows") for job in JOBS), lambda row: row[0] in ("merge", "combine")),
]


@pytest.mark.parametrize("job, ranks, system", MATRIX)
def test_the_bytes_of_one_process(ranks_bench, job: str, ranks: int, system: str):
    bench, whole = ranks_bench(job, system)
    bench.plan().succeeded()
    pids = [bench.begin(f"{rank}/{ranks}") for rank in range(ranks)]
    for pid in pids:
        bench.wait(pid).succeeded()
    bench.finish().succeeded()
    bench.check_done(whole)


@pytest.mark.parametrize("job, ranks, system", MATRIX)
def test_the_bytes_of_one_process_where_one_is_killed(
    ranks_bench, job: str, ranks: int, system: str
):
    """The others make what it leaves; alone it is run again."""
    bench, whole = ranks_bench(job, system)
    bench.plan().succeeded()
    fault = {"kill": True, "calls": ["fsync"], "when": 1}
    assert bench.worker(f"0/{ranks}", fault=fault).status == -signal.SIGKILL
    pids = [bench.begin(f"{rank}/{ranks}") for rank in range(1, ranks)]
    for pid in pids:
        bench.wait(pid).succeeded()
    if ranks == 1:
        bench.finish().failed_cleanly("files are missing")
        bench.worker("0/1").succeeded()
    bench.finish().succeeded()
    bench.check_done(whole)


@pytest.mark.parametrize(
    "job, step", [("merge", 97), *(pytest.param(job, 1, marks=SLOW) for job in ("merge", "loftq"))]
)
@pytest.mark.parametrize("system", SYSTEMS)
def test_a_rank_is_killed_at_each_call(ranks_bench, job: str, step: int, system: str):
    """Nothing bears a file's name that is not whole, and another rank makes the rest."""
    bench, whole = ranks_bench(job, system)
    for when in itertools.count(random.Random(job).randrange(step) + 1, step):
        bench.clear()
        bench.plan().succeeded()
        quiet = {"many.workers.worker.HEARTBEAT": 60}  # each word of a rank is calls, too
        ended = bench.worker("0/2", fault={"kill": True, "when": when}, constants=quiet)
        if ended.status == 0:
            break
        assert ended.status == -signal.SIGKILL
        files = bench.stage / "out"
        for name in bench.marked():
            assert (files / name).exists(), ended.last
        bench.worker("1/2").succeeded()
        bench.finish().succeeded()
        bench.check_done(whole)
    assert when > 20


@pytest.mark.parametrize("step", [97, pytest.param(1, marks=SLOW)])
@pytest.mark.parametrize("command", ["plan", "finish"])
@pytest.mark.parametrize("system", SYSTEMS)
def test_the_plan_and_the_end_are_killed_at_each_call(
    ranks_bench, command: str, step: int, system: str
):
    bench, whole = ranks_bench("merge", system)
    for when in itertools.count(random.Random(command).randrange(step) + 1, step):
        bench.clear()
        fault = {"kill": True, "when": when}
        if command == "plan":
            ended = bench.plan(fault=fault)
            bench.plan("--overwrite").succeeded()
            bench.worker().succeeded()
        else:
            bench.plan().succeeded()
            bench.worker().succeeded()
            ended = bench.finish(fault=fault)
        bench.finish().succeeded()
        bench.check_done(whole)
        if ended.status == 0:
            break
        assert ended.status == -signal.SIGKILL
    assert when > 8


def test_killed_between_the_journal_and_the_folder(merging):
    """The journal is a single process's already, the files are where the ranks left them."""
    bench, whole = merging
    bench.plan().succeeded()
    bench.worker().succeeded()
    fault = {"kill": True, "calls": ["rename"], "match": "/ranks/", "when": 1}
    assert bench.finish(fault=fault).status == -signal.SIGKILL
    bench.finish().succeeded()
    bench.check_done(whole)


def test_a_stopped_rank_wakes_after_its_file_was_made(merging):
    """And after all is finished, too: it ends without a word, and changes nothing."""
    bench, whole = merging
    for finished in (False, True):
        bench.clear()
        bench.plan().succeeded()
        pid = bench.begin("0/2", fault={"calls": ["fsync"], "when": 1, "act": [["stop", "."]]})
        until(lambda pid=pid: stopped(pid))
        bench.worker("1/2").succeeded()
        if finished:
            bench.finish().succeeded()
        os.kill(pid, signal.SIGCONT)
        bench.wait(pid).succeeded()
        if not finished:
            bench.finish().succeeded()
        bench.check_done(whole)


def test_a_rank_of_an_older_plan_wakes(merging):
    """Its files go nowhere."""
    bench, whole = merging
    bench.plan("--dtype", "fp32").succeeded()
    pid = bench.begin("0/2", fault={"calls": ["fsync"], "when": 1, "act": [["stop", "."]]})
    until(lambda: stopped(pid))
    bench.plan("--overwrite").succeeded()
    bench.worker().succeeded()
    os.kill(pid, signal.SIGCONT)
    bench.wait(pid).failed_cleanly()
    bench.finish().succeeded()
    bench.check_done(whole)


def test_missing_files_are_named(merging):
    bench, whole = merging
    bench.plan().succeeded()
    names = [entry["file"] for entry in json.loads(bench.file.read_bytes())["shards"]]
    bench.finish().failed_cleanly("3 of 3 files are missing", *names, f"run {bench.file}")
    bench.worker().succeeded()
    (bench.stage / "out" / names[1]).unlink()
    bench.finish().failed_cleanly("1 of 3 files", names[1])
    bench.worker("4/9").succeeded()
    bench.finish("--verify").succeeded()
    shutil.copy(bench.file, kept := bench.root / "kept")
    ended = bench.finish()
    ended.succeeded()
    assert "finished before" in ended.stderr
    bench.worker().succeeded()
    bench.check_done(whole)
    kept.unlink()


def test_a_changed_input_is_the_end_for_all(merging):
    """One that changes before a rank starts stops this rank, one that changes under it all."""
    bench, whole = merging
    bench.plan().succeeded()
    path = bench.root / "base" / "model-00001-of-00003.safetensors"
    bench.worker("0/2", fault={"calls": ["fsync"], "when": 1, "kill": True})
    change = {"calls": ["fsync"], "when": 1, "act": [["poke", str(path), 4000, [1, 2, 3]]]}
    before = path.read_bytes()
    bench.worker("0/2", fault=change).failed_cleanly("changed between plan and end")
    assert (bench.stage / "marks" / "FAILED").is_file()
    bench.worker("1/2").failed_cleanly("is not the file that was planned with", path.name)
    path.write_bytes(before)
    bench.finish().failed_cleanly("is not the file that was planned with")
    bench.plan("--overwrite").succeeded()
    bench.worker().succeeded()
    bench.finish().succeeded()
    bench.check_done(whole)


def test_a_failed_job_stays_failed(merging):
    bench, _ = merging
    bench.plan().succeeded()
    (bench.stage / "marks" / "FAILED").write_bytes(line_of({"reason": "a file changed"}))
    for ended in (bench.worker(), bench.finish()):
        ended.failed_cleanly("the job failed: a file changed", "--overwrite")


@pytest.mark.parametrize("entry", [{"torch": "1.0"}, {"device": "cuda Card 80GB, torch 2.13.0"}])
def test_two_kinds_of_arithmetic_are_refused(merging, entry: dict):
    bench, _ = merging
    bench.plan().succeeded()
    bench.worker().succeeded()
    path = next((bench.stage / "marks").rglob("*.json"))
    path.write_bytes(line_of(read_entry(path) | entry))
    for ended in (bench.finish(), bench.worker()):
        ended.failed_cleanly("files were made on", next(iter(entry.values())))
    path.unlink()
    bench.worker().succeeded()
    bench.finish().succeeded()


def test_a_rank_waits_for_what_its_file_needs(ranks_bench):
    """The base's files, of which a stopped rank has one; then it says so, with a status of its
    own."""
    bench, whole = ranks_bench("loftq")
    bench.plan().succeeded()
    pid = bench.begin("0/2", fault={"calls": ["fsync"], "when": 1, "act": [["stop", "."]]})
    until(lambda: stopped(pid))
    ended = bench.worker("1/2", "--wait", "0.1", constants={"many.workers.worker.STALLED": 60})
    share = json.loads(
        bench.run(["run", str(bench.file), "--worker", "1/2", "--dry-run", "--json"]).stdout
    )["share"]
    if any("adapter" in name for name in share):
        assert ended.status == 3 and "waiting for base/model-0000" in ended.stderr
    os.kill(pid, signal.SIGCONT)
    bench.wait(pid).succeeded()
    bench.worker("1/2").succeeded()
    bench.finish().succeeded()
    bench.check_done(whole)


def stopped(pid: int) -> bool:
    return "State:\tT" in Path(f"/proc/{pid}/status").read_text()


def until(condition) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)

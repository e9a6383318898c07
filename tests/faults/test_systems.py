"""The rules of Windows, and what macOS lacks, on Linux: what a job writes, killed at every call
that writes too, and locks."""

import ast
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.faults import test_computed as computed
from tests.faults.conftest import AdapterBench, Bench
from tests.faults.test_crash import sweep
from tests.support.forks import ENVIRONMENT, ROOT, program
from tests.support.usual import usual


def test_a_merge_on_macos_has_the_bytes_of_linux(shared: Bench, whole):
    shared.clear()
    shared.merge(system="macos").succeeded()
    shared.check_done(whole)


@pytest.fixture
def windows(shared: Bench) -> Bench:
    shared.clear()
    return replace(shared, defaults=shared.defaults | {"system": "windows"})


def test_a_merge_has_the_bytes_of_linux(windows: Bench, whole):
    windows.merge().succeeded()
    windows.check_done(whole)


@pytest.mark.parametrize("step", [31, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("options", [(), ("--overwrite",)])
def test_killed_at_each_call(windows: Bench, whole, older, options: tuple, step: int):
    """Nothing that is not whole is under a final name, and a resumed run ends like another."""
    older = older if options else None
    assert sweep(windows, whole, older, {"kill": True}, step, *options) > 60


def test_an_interrupted_job_is_resumed(windows: Bench, whole):
    slow = {"calls": ["pwrite"], "delay": 0.05}
    for number in (signal.SIGINT, signal.SIGUSR2):  # which stands for Ctrl-Break
        windows.clear()
        pid = windows.start(windows.argv(), slow)
        while not list(windows.control.glob("out/*")):
            assert windows.driver.process.poll() is None
        os.kill(pid, number)
        ended = windows.wait(pid)
        assert ended.status == 1 and "stopped" in ended.stderr, ended
        windows.merge("--resume").succeeded()
        windows.check_done(whole)


VERBS = {
    "convert": "convert adapter --to mlx",
    "init": "init base --method pissa --rank 2 --targets q_proj",
} | {name: computed.JOBS[name] for name in ("combine", "quantize", "loftq")}


@pytest.fixture
def windows_job(job_of) -> Callable[[str], tuple[AdapterBench, dict[str, str]]]:
    """Windows' bench of a job, and the digests of what Linux makes."""

    def make(name: str) -> tuple[AdapterBench, dict[str, str]]:
        job, whole = job_of(VERBS[name])
        return replace(job, defaults=job.defaults | {"system": "windows"}), whole

    return make


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("step", [83, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", usual(VERBS, {"convert", "combine", "quantize"}))
def test_other_verbs_killed_at_each_call(windows_job, name: str, step: int):
    assert computed.sweep(*windows_job(name), step) > 30


@pytest.mark.parametrize("name", usual(VERBS, {"convert", "quantize"}))
def test_other_verbs_that_are_interrupted_are_resumed(windows_job, name: str):
    job, whole = windows_job(name)
    pid = job.start(job.argv(), {"calls": ["pwrite"], "delay": 0.2})
    while not job.begun():
        assert job.driver.process.poll() is None
    os.kill(pid, signal.SIGUSR2)  # Ctrl-Break
    ended = job.wait(pid)
    assert ended.status == 1 and "stopped" in ended.stderr, ended
    assert not job.out.exists()
    job.check_stage(whole)
    job.merge("--resume").succeeded()
    job.check_done(whole)


def test_one_process_at_a_time(windows: Bench, whole):
    pid = windows.start(windows.argv(), {"calls": ["pwrite"], "delay": 0.05})
    while not windows.begun():
        assert windows.driver.process.poll() is None
    windows.merge("--resume").failed_cleanly("another run writes this output now")
    windows.wait(pid).succeeded()
    windows.check_done(whole)


JOBS = ("quantize-w8a16", "dequantize-w8a16", "merge-stochastic", "merge-head", "combine-ties",
        "subtract-exact", "convert-kohya", "init-pissa", "loftq-nf4", "extract-rank",
        "resize-rank", "rebase-exact", "arrow-plain", "stats-all")  # fmt: skip
EACH_VERB = f"""
import json, os
from pathlib import Path
from tests.golden import inputs, jobs
from tests.support import macos, windows

def made(folder):
    Path(folder).mkdir()
    os.chdir(folder)
    inputs.create_inputs(Path())
    every = {{job.name: job for job in jobs.WRITING}}
    for name in {JOBS}:
        for source in (*every[name].sources, name):
            if source in every and not jobs.output_of(every[source]).exists():
                jobs.call(every[source], out=str(jobs.output_of(every[source])), device="cpu")
    files = sorted(path for path in Path().rglob("*") if path.is_file())
    found = {{str(path): path.read_bytes() for path in files if "adapterkit.json" not in path.name}}
    os.chdir("..")
    return found

here = made("here")
SYSTEM.pretend()
there = made("there")
unlike = [name for name in {{*here, *there}} if here.get(name) != there.get(name)]
print(json.dumps([len(here), unlike]))
"""


@pytest.mark.parametrize("system", ["windows", "macos"])
def test_a_job_of_each_verb(system: str, tmp_path: Path, one_thread: None):
    """The same bytes as here, and no name of `os` that the system lacks is asked for."""
    done = program(EACH_VERB.replace("SYSTEM", system), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    count, unlike = json.loads(done.stdout.splitlines()[-1])
    assert count > 60 and not unlike


# one of each family that costs little
FEW = ("tests/options", "tests/formats/test_rows.py", "tests/jobs", "tests/planning",
       "tests/weights", "tests/test_errors.py", "tests/combine/test_single_methods.py",
       "tests/runtime/test_target_rules.py", "tests/kernels/test_integers.py")  # fmt: skip


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("system", "how_many"),
    usual(itertools.product(("windows", "macos"), ("few", "all")), [("windows", "few")]),
)
def test_the_quick_tests(system: str, how_many: str, tmp_path: Path):
    """As .github/workflows/systems.yml runs them: a text file without an encoding fails."""
    environment = ENVIRONMENT | {
        "ADAPTERKIT_SYSTEM": system, "PYTHONUTF8": "0", "PYTHONWARNDEFAULTENCODING": "1",
        # which takes as long to import as these tests take
        "ADAPTERKIT_LACKS": "bitsandbytes" if how_many == "few" else "",
    }  # fmt: skip
    suites = FEW if how_many == "few" else ("tests",)
    options = ("-m", "quick", "-q", "-n0", "-p", "tests.support.pretending",
               "-p", "no:cacheprovider", "--timeout-method=thread",
               f"--basetemp={tmp_path / 'of-them'}")  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *suites],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr
    assert int(done.stdout.rpartition(" passed")[0].split()[-1]) > 100


LONG_PATHS = """
from pathlib import Path
from tests.golden.inputs import create_inputs
from tests.support import windows

create_inputs(Path())
windows.pretend()
import adapterkit
from adapterkit.core.system import system
from adapterkit.core.errors import Refused

def made(length):
    adapter = "adapter_model.safetensors.part"
    room = length - len(str(Path.cwd() / "x" / "..adapterkit" / "out" / adapter))
    out = Path("x", "y" * (room - 200), "z" * 200) if room > 255 else Path("x", "y" * room)
    try:
        adapterkit.combine(["law", "medicine"], method="linear", out=out)
    except Refused as error:
        assert not out.exists() and len(list(out.parent.iterdir())) == 1
        return str(error)
    return sorted(path.name for path in out.iterdir())

system.kernel.long_paths = 0
short, long = made(259), made(260)
system.kernel.long_paths = 1
print(repr([short, long, made(400)]))
words = ["C:\\\\a b\\\\", "down_proj|up=8", "a@b", "@b", "C:/lora=0.5", 'say "no"', "a,b",
         "$(x)`y`%PATH%"]
print(*map(system.quote, words))
"""


def test_long_paths_and_quotes(tmp_path: Path, one_thread: None):
    """260 letters are refused before anything is written, unless long paths are enabled."""
    done = program(LONG_PATHS, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    results, words = done.stdout.splitlines()[-2:]
    short, long, enabled = ast.literal_eval(results)
    assert "adapter_model.safetensors" in short and short == enabled
    assert "would be too long by 1" in long and "long paths enabled in Windows" in long
    assert words == (
        r'"C:\a b\\" "down_proj|up=8" a@b "@b" C:/lora=0.5 "say _no_" "a,b" "_(x)_y__PATH_"'
    )

"""Processes that are forks of one that has imported torch and the package: a command in a fiftieth
of the time."""

import atexit
import functools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import adapterkit

MEMORY = 1 << 30
ROOT = Path(__file__).parents[2]
# the package that the tests import, installed or not, the tests themselves, and no network
ENVIRONMENT = os.environ | {
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": os.pathsep.join(map(str, (Path(adapterkit.__file__).parents[1], ROOT))),
}


@dataclass
class Ended:
    """What a run left: its exit status (negative: the signal that ended it), texts, and how many
    calls were counted."""

    status: int
    stdout: str
    stderr: str
    calls: int
    last: str
    memory: int
    seconds: float

    def failed_cleanly(self, *words: str) -> None:
        """Status 1 and a message that holds the words; no traceback; little memory."""
        if self.status == 70:
            print(self.stderr)
        assert self.status == 1, (self.status, self.stderr, self.last)
        assert self.stderr.startswith("Error: ") and "Traceback" not in self.stderr, self.stderr
        assert "hint:" in self.stderr, self.stderr
        assert self.memory < MEMORY
        for word in words:
            assert word in self.stderr, (word, self.stderr)

    def succeeded(self) -> None:
        assert self.status == 0, (self.status, self.stderr, self.last)
        assert "Traceback" not in self.stderr, self.stderr
        assert self.memory < MEMORY


class Forks:
    """A process that forks for each command or program; one that rehearses has each verb's imports
    after its first, and knows one environment of the Hub."""

    def __init__(self, environment: Mapping[str, str] = ENVIRONMENT, rehearse: bool = True):
        script = str(Path(__file__).with_name("fork_server.py"))
        self.process = subprocess.Popen(
            [sys.executable, "-P", script, *["rehearse"] * rehearse],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8", env=environment,
        )  # fmt: skip
        assert self.process.stdout.readline() == "ready\n"
        self.lock = threading.Lock()

    def ask(self, **request) -> dict:
        with self.lock:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            return json.loads(self.process.stdout.readline())

    def start(self, **request) -> int:
        test = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" (")[0]
        return self.ask(test=test, **request)["pid"]

    def wait(self, pid: int, timeout: float = 60) -> Ended:
        return Ended(**self.ask(wait=pid, timeout=timeout))

    def stop(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


@functools.cache
def forks(rehearse: bool = True) -> Forks:
    """The fork server of this process of the tests."""
    server = Forks(rehearse=rehearse)
    atexit.register(server.stop)
    return server


def command(
    *words,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    timeout: float = 120,
    system: str = "linux",
) -> subprocess.CompletedProcess[str]:
    """`adapterkit WORDS` as a process of its own, of this system; what an environment says of the
    Hub counts."""
    server = forks(rehearse=env is None)
    where = {"cwd": str(cwd)} if cwd else {}
    where |= {} if env is None else {"env": dict(env)}
    where |= {} if system == "linux" else {"system": system}
    argv = [str(word) for word in words]
    ended = server.wait(server.start(argv=argv, **where), timeout)
    return subprocess.CompletedProcess(argv, ended.status, ended.stdout, ended.stderr)


def program(
    text: str, cwd: Path, timeout: float = 300, imports: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """A program of Python in a process of its own, which finds these modules imported."""
    server = forks()
    ended = server.wait(server.start(program=text, cwd=str(cwd), imports=imports), timeout)
    return subprocess.CompletedProcess(text, ended.status, ended.stdout, ended.stderr)

"""The Slurm lines of docs/machines.md under Slurm itself: four daemons of this machine.

Debian's packages are slurm-wlm and munge. slurmd starts jobs as their user, so only root runs this.
"""

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.jobs.conftest import FINISH, PLAN, LinesBench, launcher_lines, workers_in, write_command
from tests.support import daemons
from tests.support.documents import ROOT

PROGRAMS = ("munged", "mungekey", "slurmctld", "slurmd", "sinfo", "srun", "sbatch")
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
MISSING = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
NODES, SECONDS = 4, 60
LAUNCHER = re.compile("(SLURM|SBATCH|SRUN|PMI|OMPI)_|(RANK|WORLD_SIZE|JOB_COMPLETION_INDEX)$")
LINES = {  # and a job array of job steps
    name: line for name, line in launcher_lines().items() if name in ("srun", "sbatch")
} | {"both": 'sbatch --array 0-1 --ntasks 2 --wrap "srun adapterkit run merged.plan.json"'}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"Slurm: no {', '.join(MISSING)} installed"),
    pytest.mark.skipif(os.geteuid() != 0, reason="Slurm: slurmd must be run by root"),
]

CONFIGURATION = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdSpoolDir={folder}/%n
SlurmdPidFile={folder}/%n.pid
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
MpiDefault=none
MailProg=/bin/true
{nodes}
PartitionName=all Nodes=ALL Default=YES
"""


RUN = 'cd "$0" && status=$1 && shift && "$@"; echo $? >"$status"'


@dataclass
class Slurm:
    """A cluster whose files all lie in `folder`.

    Its daemons and the commands on it are children of `process`, which ends them when it loses its
    input: at the latest with the tests.
    """

    folder: Path
    process: subprocess.Popen[str]

    def start(self, *command: str) -> Path:
        """Start a daemon or a command; the file of its messages."""
        number = len(list(self.folder.glob("*.messages")))
        messages = self.folder / f"{number}.messages"
        messages.write_text("")
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([command, str(messages)]) + "\n")
        self.process.stdin.flush()
        return messages

    def run(self, words: list[str], folder: Path) -> str:
        """What a command prints, messages too; it must end well."""
        status = self.folder / "status"
        status.write_text("")
        messages = self.start("sh", "-c", RUN, str(folder), str(status), *words)
        self.until(status.read_text)
        assert status.read_text() == "0\n", f"{words}{self.messages(folder)}"
        return messages.read_text()

    def until(self, found: Callable[[], Any]) -> None:
        end = time.monotonic() + SECONDS
        while not found():
            assert time.monotonic() < end, self.messages(self.folder)
            time.sleep(0.1)

    def messages(self, folder: Path) -> str:
        """The end of what the daemons, the commands and the jobs in `folder` have written."""
        files = sorted({*self.folder.glob("*.messages"), *folder.glob("slurm-*.out")})
        return "".join(f"\n{file.name}:\n{file.read_text()[-2000:]}" for file in files)

    def idle(self) -> bool:
        printed = self.run(["sh", "-c", "sinfo --noheader --Node --format %T || true"], self.folder)
        return printed.split() == ["idle"] * NODES


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    folder = tmp_path_factory.mktemp("slurm")
    configure(folder)
    environment = {key: text for key, text in os.environ.items() if not LAUNCHER.match(key)} | {
        "PATH": f"{folder}:{PATH}",
        "PYTHONPATH": str(ROOT),
        "SLURM_CONF": str(folder / "slurm.conf"),
        "SBATCH_WAIT": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    process = subprocess.Popen(
        [sys.executable, "-P", daemons.__file__],
        env=environment,
        stdin=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C is for the tests: they close the input
    )
    assert process.stdin is not None
    try:
        cluster = Slurm(folder, process)
        key, endpoint = folder / "munge.key", folder / "munge.socket"
        cluster.run(["mungekey", "--create", f"--keyfile={key}"], folder)
        files = [f"--pid-file={folder / 'munged.pid'}", f"--seed-file={folder / 'munged.seed'}"]
        # force: the folders of tests are closed to others
        words = ["munged", "--foreground", "--force", "--num-threads=10"]
        cluster.start(*words, f"--key-file={key}", f"--socket={endpoint}", *files)
        cluster.until(endpoint.exists)
        cluster.start("slurmctld", "-D", "-i")
        for number in range(NODES):
            cluster.start("slurmd", "-D", "-N", f"n{number}")
        cluster.until(cluster.idle)
        yield cluster
    finally:
        process.stdin.close()
        assert process.wait(timeout=SECONDS) == 0


def configure(folder: Path) -> None:
    """Write Slurm's files, and a command `adapterkit` that is this one."""
    ports, host = free_ports(1 + NODES), socket.gethostname().partition(".")[0]
    nodes = "\n".join(
        f"NodeName=n{number} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=1"
        for number, port in enumerate(ports[1:])
    )
    text = CONFIGURATION.format(host=host, port=ports[0], folder=folder, nodes=nodes)
    (folder / "slurm.conf").write_text(text)
    (folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
    for name in ("state", *(f"n{number}" for number in range(NODES))):
        (folder / name).mkdir()
    write_command(folder)


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@pytest.mark.parametrize("launcher", LINES)
def test_the_lines_of_scale_make_the_bytes_of_one_process(
    launcher: str, slurm: Slurm, lines_bench: LinesBench
):
    """Each of four processes is another rank, whichever makes a file first."""
    folder = lines_bench.folder
    slurm.run(shlex.split(PLAN), folder)
    printed = slurm.run(shlex.split(LINES[launcher]), folder)
    for file in folder.glob("slurm-*_*.out"):
        printed += file.read_text()
        file.unlink()
    assert workers_in(printed) == [f"{rank}/4" for rank in range(4)], printed
    slurm.run(shlex.split(FINISH), folder)
    lines_bench.check_done()

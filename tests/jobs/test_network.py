"""Ranks on several machines that share a folder over the network: namespaces of their own host
name, processes and mounts, each with a client of its own.

GlusterFS is a file system of clusters; here it spreads files over two folders. A client of SFTP
keeps attributes and lists of folders for twenty seconds, and has its own numbers of inodes and
times in whole seconds. Debian's packages are glusterfs-server, and sshfs with
openssh-sftp-server.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

import adapterkit
from tests.faults.conftest import digests, make_adapter, make_base
from tests.support import daemons
from tests.support.forks import ENVIRONMENT

SFTP = "/usr/lib/openssh/sftp-server"
PROGRAMS = {"gluster": ("glusterd", "gluster", "glusterfs"), "sftp": ("sshfs", SFTP)}
GLUSTER_PORT = 24007
GLUSTERD = """volume management
type mgmt/glusterd
option working-directory {folder}/state
option run-directory {folder}
option transport-type socket
option glusterd-sockfile {folder}/socket
end-volume
"""
MACHINE = """
name=$1 mount=$2 shared=$3; shift 3
hostname "$name" && eval "$mount" || exit 1
"$@"; status=$?
umount "$shared"; exit $status
"""
NAMESPACES = ["--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
RUN = "import os; {}; from adapterkit.cli import process; process()"
# a rank that is lost when its first file is durable, and one that takes it for gone soon
LOST = "os.fsync = lambda file: os.kill(os.getpid(), 9)"
SOON = (
    "from adapterkit.many.workers import worker; "
    "worker.STALLED = worker.HEARTBEAT = worker.POLL = 1"
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: it mounts file systems"),
    pytest.mark.skipif(not os.path.exists("/dev/fuse"), reason="needs FUSE"),
]


@contextmanager
def sftp(folder: Path) -> Iterator[str]:
    """A mount's command, in the shell, for which `shared` is the place."""
    client, server = folder / "client", folder / "server"
    server.mkdir()
    client.write_text(f"#!/bin/sh\nexec {SFTP}\n")
    client.chmod(0o755)
    yield f'sshfs -o ssh_command={client} server:{server} "$shared"'


@contextmanager
def gluster(folder: Path) -> Iterator[str]:
    """As `sftp`, of a volume that daemons of this machine serve."""
    host = _address()
    if _is_taken(GLUSTER_PORT):
        pytest.skip("a Gluster server runs here")  # clients find bricks at this port only
    file, messages = folder / "glusterd.vol", folder / "messages"
    file.write_text(GLUSTERD.format(folder=folder))
    (folder / "state").mkdir()
    process = subprocess.Popen(
        [sys.executable, "-P", daemons.__file__],
        stdin=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C is for the tests: they close the input
    )
    assert process.stdin is not None
    try:
        words = ["glusterd", "-N", f"--volfile={file}", "--log-file=-"]
        process.stdin.write(json.dumps([words, str(messages)]) + "\n")
        process.stdin.flush()
        bricks = [f"{host}:{folder}/brick{number}" for number in range(2)]
        for words in (["create", "shared", *bricks, "force"], ["start", "shared"]):
            command = ["gluster", f"--glusterd-sock={folder}/socket", "--mode=script", "volume"]
            _until(lambda words=[*command, *words]: _succeeds(words), messages)
        mount = f'mount -t glusterfs {host}:/shared "$shared"'
        probe = Machines(folder / "shared", mount)
        _until(lambda: _succeeds(probe.command("probe", "true")), messages)
        yield mount
    finally:
        process.stdin.close()
        assert process.wait(timeout=60) == 0


def _address() -> str:
    """This machine's, as Gluster takes no loopback one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
        except OSError as error:
            pytest.skip(f"no network address here: {error}")
        return probe.getsockname()[0]


def _is_taken(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _succeeds(words: list[str]) -> bool:
    return subprocess.run(words, capture_output=True).returncode == 0


def _until(found: Callable[[], bool], messages: Path) -> None:
    end = time.monotonic() + 60
    while not found():
        assert time.monotonic() < end, messages.read_text()[-2000:]
        time.sleep(0.2)


KINDS: dict[str, Callable[[Path], AbstractContextManager[str]]] = {"gluster": gluster, "sftp": sftp}


@dataclass(frozen=True)
class Machines:
    """`shared` is where all machines have the folder that `mount` gives them."""

    shared: Path
    mount: str

    def start(self, name: str, *words: str, first: str = "pass") -> subprocess.Popen[str]:
        """Start a command of adapterkit on a machine, `first` in its process before it."""
        return self.start_program(name, sys.executable, "-c", RUN.format(first), *words)

    def command(self, name: str, *words: str) -> list[str]:
        machine = ["sh", "-c", MACHINE, "sh", name, self.mount, str(self.shared)]
        return ["unshare", *NAMESPACES, *machine, *words]

    def start_program(self, name: str, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(name, *words),
            env=ENVIRONMENT | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, name: str, *words: str, first: str = "pass") -> str:
        return printed(self.start(name, *words, first=first))

    @property
    def plan_file(self) -> str:
        return str(self.shared / "plan.json")

    def plan(self) -> None:
        sources = [str(self.shared / name) for name in ("base", "adapter")]
        out = str(self.shared / "out")
        self.run("login", "merge", *sources, "--out", out, "--plan", self.plan_file)

    def check_done(self, whole: dict[str, str], folder: Path) -> None:
        self.run("login", "finish", self.plan_file, "--verify")
        printed(self.start_program("login", "cp", "-r", str(self.shared / "out"), str(folder)))
        assert digests(folder) == whole


def printed(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate()
    assert process.returncode == 0, output
    return output


@pytest.fixture(scope="module", params=KINDS)
def bench(request, tmp_path_factory) -> Iterator[tuple[Machines, dict[str, str]]]:
    """Machines, and the digests of what one process makes."""
    missing = [name for name in PROGRAMS[request.param] if shutil.which(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    folder = tmp_path_factory.mktemp(request.param)
    local, shared = folder / "local", folder / "shared"
    local.mkdir()
    shared.mkdir()
    make_base(local / "base")
    make_adapter(local / "adapter")
    adapterkit.merge(local / "base", [local / "adapter"], out=folder / "whole")
    with KINDS[request.param](folder) as mount:
        machines = Machines(shared, mount)
        inputs = [str(local / name) for name in ("base", "adapter")]
        printed(machines.start_program("login", "cp", "-r", *inputs, str(shared)))
        yield machines, digests(folder / "whole")


@pytest.fixture
def machines(bench: tuple[Machines, dict[str, str]]) -> Iterator[Machines]:
    machines, _ = bench
    machines.plan()
    yield machines
    clear = 'rm -r "$1"/out "$1"/.out.adapterkit "$1"/plan.json 2>/dev/null; true'
    printed(machines.start_program("login", "sh", "-c", clear, "sh", str(machines.shared)))


def test_the_bytes_of_one_process(machines: Machines, bench, tmp_path: Path):
    ranks = [
        machines.start(f"node{rank}", "run", machines.plan_file, "--worker", f"{rank}/2")
        for rank in range(2)
    ]
    for rank in ranks:
        assert "all files are written" in printed(rank)
    machines.check_done(bench[1], tmp_path / "copy")


def test_a_machine_is_lost(machines: Machines, bench, tmp_path: Path):
    """Another takes over what it had begun when it has not heard of it for a while."""
    words = ["run", machines.plan_file, "--rank"]
    lost = machines.start("node0", *words, "0/2", first=LOST)
    lost.communicate()
    assert lost.returncode == 128 + 9
    assert "for other workers" in machines.run("node1", *words, "1/2", first=SOON)
    machines.check_done(bench[1], tmp_path / "copy")


def test_an_input_changes(machines: Machines):
    name = "model-00002-of-00003.safetensors"
    touch = ["touch", "-d", "2001-01-01", str(machines.shared / "base" / name)]
    printed(machines.start_program("login", *touch))
    rank = machines.start("node0", "run", machines.plan_file)
    output, _ = rank.communicate()
    assert rank.returncode == 1, output
    assert f"{name} is not the file that was planned with" in output

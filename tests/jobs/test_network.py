"""Ranks on several machines that share a folder over the network: namespaces of their own host
name, processes and mounts, each with a client of SFTP of its own.

A client keeps attributes and lists of folders for twenty seconds, has its own numbers of inodes,
and times in whole seconds. Debian's packages are sshfs and openssh-sftp-server.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import adapterkit
from tests.faults.conftest import ENVIRONMENT, digests, make_adapter, make_base

SFTP = "/usr/lib/openssh/sftp-server"
MISSING = [
    name
    for name, found in {
        "root": os.geteuid() == 0,
        "/dev/fuse": os.path.exists("/dev/fuse"),
        "unshare": shutil.which("unshare"),
        "sshfs": shutil.which("sshfs"),
        SFTP: os.path.exists(SFTP),
    }.items()
    if not found
]
MACHINE = """
hostname "$1"; server=$2 shared=$3 client=$4; shift 4
sshfs -o ssh_command="$client" "server:$server" "$shared" || exit 1
"$@"; status=$?
fusermount3 -u "$shared"; exit $status
"""
NAMESPACES = ["--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
# a rank that is lost when its first file is durable, and another that takes it for gone soon
LOST = "os.fsync = lambda file: os.kill(os.getpid(), 9)"
SOON = "from adapterkit.engines import ranks; ranks.STALLED = ranks.BEAT = ranks.POLL = 1"
RUN = "import os; {}; from adapterkit.cli import process; process()"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"no {', '.join(MISSING)}"),
]


@dataclass(frozen=True)
class Machines:
    """`server` is the folder on its machine, `shared` where the others have it."""

    server: Path
    shared: Path
    client: Path
    whole: dict[str, str]

    def start(self, name: str, *words: str, first: str = "pass") -> subprocess.Popen[str]:
        """Start a command of adapterkit on a machine, `first` in its process before it."""
        command = [sys.executable, "-c", RUN.format(first), *words]
        places = [str(place) for place in (self.server, self.shared, self.client)]
        return subprocess.Popen(
            ["unshare", *NAMESPACES, "sh", "-c", MACHINE, "sh", name, *places, *command],
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

    def finish(self) -> None:
        self.run("login", "finish", self.plan_file, "--verify")
        assert digests(self.server / "out") == self.whole


def printed(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate()
    assert process.returncode == 0, output
    return output


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    server, shared, client = tmp_path / "server", tmp_path / "shared", tmp_path / "client"
    server.mkdir()
    shared.mkdir()
    make_base(server / "base")
    make_adapter(server / "adapter")
    client.write_text(f"#!/bin/sh\nexec {SFTP}\n")
    client.chmod(0o755)
    adapterkit.merge(server / "base", [server / "adapter"], out=server / "out")
    whole = digests(server / "out")
    shutil.rmtree(server / "out")
    yield Machines(server, shared, client, whole)


def test_the_bytes_of_one_process(machines: Machines):
    machines.plan()
    ranks = [
        machines.start(f"node{rank}", "run", machines.plan_file, "--rank", f"{rank}/2")
        for rank in range(2)
    ]
    for rank in ranks:
        assert "all files are there" in printed(rank)
    machines.finish()


def test_a_machine_is_lost(machines: Machines):
    """Another takes over what it had begun when it has not heard of it for a while."""
    machines.plan()
    words = ["run", machines.plan_file, "--rank"]
    lost = machines.start("node0", *words, "0/2", first=LOST)
    lost.communicate()
    assert lost.returncode == 128 + 9
    assert list(machines.server.rglob("*.part"))
    assert "of other ranks" in machines.run("node1", *words, "1/2", first=SOON)
    machines.finish()


def test_an_input_changes(machines: Machines):
    machines.plan()
    shard = machines.server / "base" / "model-00002-of-00003.safetensors"
    os.utime(shard, (0, 0))
    rank = machines.start("node0", "run", machines.plan_file)
    output, _ = rank.communicate()
    assert rank.returncode == 1, output
    assert f"{shard.name} is not the file that was planned with" in output

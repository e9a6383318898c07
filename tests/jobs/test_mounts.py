"""Ranks that see one file system under several device numbers, as machines do."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.conftest import RECEIPT
from tests.support.faults import root

# the base, as another mount shows it: other device, same inodes and times
MOUNT = 'mount -t overlay overlay -o lowerdir="$1":"$2" "$1"'


def elsewhere(base: Path, empty: Path, command: str, *words: str) -> subprocess.CompletedProcess:
    """Run a command in a namespace in which the base is mounted once more."""
    script = f'{MOUNT} && shift 2 && {command} "$@"'
    isolated = ["unshare", "--mount", "sh", "-c", script, "sh", str(base), str(empty), *words]
    return subprocess.run(isolated, capture_output=True, text=True)


@root
def test_another_mount_of_the_same_file_system(merging):
    bench, whole = merging
    base, empty = bench.root / "base", bench.root / "empty"
    empty.mkdir()
    shown = elsewhere(base, empty, "stat -c %d", str(base / "config.json"))
    if shown.returncode:
        pytest.skip(f"no overlay mount here: {shown.stderr.strip()}")
    assert int(shown.stdout) != os.stat(base / "config.json").st_dev
    bench.plan().succeeded()
    words = [sys.executable, "-m", "adapterkit", "run", str(bench.file), "--worker", "0/2"]
    ended = elsewhere(base, empty, "exec", *words)
    assert ended.returncode == 0, ended.stderr
    bench.worker("1/2").succeeded()
    assert "0/2: wrote 3 files" in ended.stderr
    bench.finish().succeeded()
    # metrics are of samples, and a process that is no fork of the driver has other chunks
    assert bench.digests() | {RECEIPT: ""} == whole | {RECEIPT: ""}

"""Full, small, read-only and mounted file systems, and a loss of power."""

import itertools
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests.support.faults import root

# -- file systems --


def mount(*arguments: str) -> None:
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount here: {done.stderr.strip()}")


@pytest.fixture
def mounted(bench):
    """Mounts that are taken away at the end."""
    points: list[Path] = []

    def add(point: Path, *arguments: str) -> Path:
        point.mkdir(exist_ok=True)
        mount(*arguments, str(point))
        points.append(point)
        return point

    yield add
    for point in reversed(points):
        subprocess.run(["umount", "-l", str(point)], check=True)


@root
@pytest.mark.parametrize("size", ["24k", "1000k"])
def test_a_disk_that_is_too_small(bench, mounted, size: str):
    """Refused before anything is written, with both numbers; nothing is left."""
    disk = mounted(bench.root / "disk", "-t", "tmpfs", "-o", f"size={size}", "tmpfs")
    bench.out = disk / "out"
    bench.merge().failed_cleanly("bytes free", "free some space")
    assert list(disk.iterdir()) == []
    argv = [
        "merge",
        str(bench.base),
        str(bench.adapter),
        "--out",
        str(bench.out),
        "--dry-run",
        "--json",
    ]
    assert json.loads(bench.run(argv).stdout)["totals"]["disk_needed"] > 24_000


@root
def test_space_of_an_interrupted_run_counts_as_free(bench, mounted):
    """The half-written shards of a killed run take the space that its resumed run needs."""
    disk = mounted(bench.root / "disk", "-t", "tmpfs", "-o", "size=1200k", "tmpfs")
    bench.out = disk / "out"
    assert (
        bench.merge(fault={"kill": True, "calls": ["fsync"], "match": ".part", "when": 1}).status
        == -signal.SIGKILL
    )
    free = os.statvfs(disk)
    part = next((bench.control / "out").glob("*.part"))
    with part.open("r+b") as file:  # as if it were a large one
        os.posix_fallocate(file.fileno(), 0, free.f_bavail * free.f_frsize - 65536)
    bench.merge("--resume").succeeded()


@root
def test_a_disk_that_fills_up(bench, mounted, whole):
    """Space that was there at the start is gone later: a message, and a resumed run once there is
    some again."""
    disk = mounted(bench.root / "disk", "-t", "tmpfs", "-o", "size=1200k", "tmpfs")
    bench.out = disk / "out"
    filler = disk / "filler"
    with bench.held("fallocate") as pid, filler.open("wb", buffering=0) as file:
        while True:
            try:
                file.write(bytes(4096))
            except OSError:
                break
    bench.wait(pid).failed_cleanly("No space left on device", "free some space")
    assert not bench.out.exists()
    filler.unlink()
    bench.merge("--resume").succeeded()
    assert bench.digests() == whole


@root
def test_a_read_only_file_system(bench, mounted):
    disk = mounted(bench.root / "disk", "-t", "tmpfs", "-o", "ro,size=1m", "tmpfs")
    bench.out = disk / "out"
    bench.merge().failed_cleanly("Read-only file system", "choose another --out")


def inner_clear(bench) -> None:
    for path in bench.out.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def check_inner(bench, whole, older) -> None:
    """Every file is whole; with a config they are of one output."""
    found = {
        name: sha for name, sha in bench.digests().items() if not name.startswith("lost+found")
    }
    for name, sha in found.items():
        assert sha in (whole.get(name), (older or {}).get(name)), name
    if (
        "config.json" in found
        or "adapterkit.json" in found
        or "model.safetensors.index.json" in found
    ):
        shards = {name: sha for name, sha in found.items() if name.endswith(".safetensors")}
        outputs = [
            {n: s for n, s in o.items() if n.endswith(".safetensors")} for o in (whole, older) if o
        ]
        assert shards in outputs


@root
@pytest.mark.parametrize("kind", ["tmpfs", "bind"])
@pytest.mark.parametrize("step", [89, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("options", [(), ("--overwrite",)])
def test_an_output_that_is_a_mount_point(
    bench, mounted, whole, older, kind: str, step: int, options: tuple
):
    """No rename replaces it: the files move in one by one. Killed at every step, nothing that loads
    is mixed, and it resumes."""
    (bench.root / "real").mkdir()
    mounted(
        bench.out,
        *(["-t", "tmpfs", "tmpfs"] if kind == "tmpfs" else ["--bind", str(bench.root / "real")]),
    )
    control = bench.out / ".adapterkit"
    for when in itertools.count(1, step if kind == "tmpfs" else step * 2):
        inner_clear(bench)
        if options:
            bench.merge(weight="0.5").succeeded()
        else:
            (bench.out / "lost+found").mkdir()  # ext4 puts it there
        ended = bench.merge(*options, fault={"kill": True, "when": when})
        if ended.status == 0:
            break
        assert ended.status == -signal.SIGKILL
        try:
            check_inner(bench, whole, older if options else None)
            bench.check_stage(whole, control)
            ended = bench.merge("--resume")
            if "differs" in ended.stderr and options:
                ended = bench.merge("--resume", *options)
            ended.succeeded()
            assert bench.digests() == whole and not control.exists()
        except AssertionError as error:
            raise AssertionError(f"killed at call {when}, {ended.last}") from error
    assert when > 30
    assert bench.digests() == whole and not control.exists()


@root
def test_a_mount_point_keeps_what_is_not_ours(bench, mounted, whole):
    mounted(bench.out, "-t", "tmpfs", "tmpfs")
    (bench.out / "notes.txt").write_text("mine")
    bench.merge().failed_cleanly("the output folder holds notes.txt")
    (bench.out / "notes.txt").unlink()
    (bench.base / "vocab.txt").write_text("a")
    bench.merge(weight="0.5").succeeded()
    (bench.base / "vocab.txt").unlink()
    bench.merge("--overwrite").succeeded()
    assert bench.digests() == whole  # and not the older output's vocab.txt


# -- power loss --


@pytest.fixture(params=["ext4", "xfs"])
def disk(request, bench):
    """A file system on a loop device that can lose power: (its folder, a function that takes the
    power away and mounts again)."""
    kind = request.param
    make = shutil.which(f"mkfs.{kind}", path=os.environ["PATH"] + ":/usr/sbin:/sbin")
    if make is None:
        pytest.skip(f"needs mkfs.{kind}")
    image, point = bench.root / "image", bench.root / "disk"
    with image.open("wb") as file:
        file.truncate(320 << 20 if kind == "xfs" else 32 << 20)
    subprocess.run([make, "-q", str(image)], check=True)
    point.mkdir()
    mount("-o", "loop", str(image), str(point))

    def again() -> None:
        subprocess.run(["umount", str(point)], check=True)
        mount("-o", "loop", str(image), str(point))

    yield point, again
    subprocess.run(["umount", "-l", str(point)], check=True)


@root
@pytest.mark.parametrize("step", [211, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("flag", [1, 2], ids=["log-flushed", "nothing-flushed"])
@pytest.mark.parametrize("options", [(), ("--overwrite",)])
def test_after_a_power_loss_no_complete_file_is_wrong(
    bench, disk, whole, older, step: int, flag: int, options: tuple
):
    """The file system stops at the N-th call. Log flushed: names survive, data that was not synced
    does not (files of the right size full of zeros). After the power is back nothing whole is
    missing, nothing that has its name is damaged, and it resumes."""
    point, again = disk
    bench.out = point / "out"
    if options:
        bench.merge(weight="0.5").succeeded()
        shutil.copytree(bench.out, bench.root / "kept")
    for when in itertools.count(1 + flag, step):
        bench.clear()
        if options:
            shutil.copytree(bench.root / "kept", bench.out)
        os.sync()
        ended = bench.merge(*options, fault={"when": when, "act": [["shutdown", str(point), flag]]})
        if ended.status == 0:
            break
        assert ended.status == -signal.SIGKILL, ended
        again()
        try:
            found = bench.digests() if bench.out.exists() else None
            assert found in ((whole, older) if options else (None, whole))
            if found != whole:
                bench.check_stage(whole)
            ended = bench.merge("--resume")
            if "differs" in ended.stderr and options:
                ended = bench.merge("--resume", *options)
            ended.succeeded()
            assert bench.digests() == whole and not bench.control.exists()
        except AssertionError as error:
            raise AssertionError(f"power lost at call {when}, {ended.last}") from error
    assert when > 100

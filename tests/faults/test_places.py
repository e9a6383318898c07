"""Where an output may go, and what is never replaced."""

import os

import pytest

from tests.support.faults import root


@pytest.mark.parametrize(
    "out",
    ["base", "base/merged", "base/x/y", "adapter", "adapter/out", ".", "link", "dangling", "file"],
)
def test_outputs_that_are_inputs(bench, out: str):
    (bench.root / "link").symlink_to(bench.base)
    (bench.root / "dangling").symlink_to(bench.root / "nowhere")
    (bench.root / "file").write_text("a file")
    before = {p: p.read_bytes() for p in bench.root.rglob("*") if p.is_file()}
    for more in ((), ("--overwrite",), ("--resume",)):
        bench.run(
            ["merge", str(bench.base), str(bench.adapter), "--out", str(bench.root / out), *more]
        ).failed_cleanly()
    assert {p: p.read_bytes() for p in bench.root.rglob("*") if p.is_file()} == before


def test_a_hard_linked_input_is_not_written_to(bench):
    """An older output whose files are hard links of the base's: replacing it leaves the base
    alone."""
    bench.merge(weight="0.5").succeeded()
    for path in bench.base.glob("*.safetensors"):
        (bench.out / path.name).unlink()
        os.link(path, bench.out / path.name)
    before = {p: p.read_bytes() for p in bench.base.iterdir()}
    bench.merge("--overwrite").succeeded()
    assert {p: p.read_bytes() for p in bench.base.iterdir()} == before


@pytest.mark.parametrize(
    "name", ["notes.txt", ".hidden", "sub/notes.txt", "model-00009-of-00009.safetensors"]
)
def test_files_of_others_are_not_replaced(bench, name: str):
    bench.merge(weight="0.5").succeeded()
    (bench.out / name).parent.mkdir(exist_ok=True)
    (bench.out / name).write_text("mine")
    before = bench.digests()
    bench.merge("--overwrite").failed_cleanly(name)
    bench.merge().failed_cleanly("the output folder holds")
    assert bench.digests() == before


def test_files_that_appear_during_a_run(bench, whole):
    """Somebody puts a file where the output will be: it is not replaced, and the work is kept."""
    for older_output in (False, True):
        bench.clear()
        if older_output:
            bench.merge(weight="0.5").succeeded()
        with bench.held("pwrite", options=["--overwrite"] * older_output) as pid:
            bench.out.mkdir(exist_ok=True)
            (bench.out / "mine.txt").write_text("mine")
        bench.wait(pid).failed_cleanly("mine.txt")
        assert (bench.out / "mine.txt").read_text() == "mine"
        (bench.out / "mine.txt").unlink()
        bench.merge("--resume").succeeded()
        assert bench.digests() == whole


def test_an_exchange_never_takes_what_it_did_not_check(bench):
    """--overwrite of a folder without a receipt, or with a receipt that names other files."""
    bench.out.mkdir()
    (bench.out / "model.safetensors").write_text("mine")
    bench.merge("--overwrite").failed_cleanly("that adapterkit did not write")
    assert (bench.out / "model.safetensors").read_text() == "mine"


@root
@pytest.mark.parametrize("out", ["out", "sub/out"])
def test_a_parent_without_permission(bench, out: str):
    """As an ordinary user."""
    for path in [bench.root, *bench.root.rglob("*")]:
        os.chmod(path, 0o755 if path.is_dir() else 0o644)
    opened = [p for p in bench.root.parents if p.stat().st_uid == 0 and not p.stat().st_mode & 1]
    try:
        for path in opened:
            path.chmod(path.stat().st_mode | 0o1)
        argv = ["merge", str(bench.base), str(bench.adapter), "--out", str(bench.root / out)]
        bench.run(argv, user=65534).failed_cleanly("Permission denied", "choose another --out")
        assert not (bench.root / out).exists()
        # the folder is there and writable, its parent is not: the files move into it
        bench.out.mkdir()
        os.chown(bench.out, 65534, 65534)
        bench.merge(user=65534).succeeded()
        assert bench.digests() == bench.undisturbed()
        bench.out.chmod(0o555)
        bench.merge("--overwrite", user=65534, weight="0.5").failed_cleanly("Permission denied")
    finally:
        for path in opened:
            path.chmod(path.stat().st_mode & ~0o1)


def test_the_umask_decides(bench):
    for umask in (0o022, 0o077, 0o000):
        bench.clear()
        bench.merge(umask=umask).succeeded()
        assert {p.stat().st_mode & 0o777 for p in bench.out.iterdir()} == {0o666 & ~umask}
        assert bench.out.stat().st_mode & 0o777 == 0o777 & ~umask


def test_a_limit_of_64_open_files(many_shards):
    """Small shards are begun faster than the disk takes them: not all of them are open at once."""
    bench = many_shards
    bench.merge(
        limits={"NOFILE": 64}, fault={"calls": ["fsync"], "delay": 0.003}, workers=8
    ).succeeded()
    assert len(list(bench.out.glob("*.safetensors"))) == 300
    bench.run(["verify", str(bench.out)], limits={"NOFILE": 64}).succeeded()

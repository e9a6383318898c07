"""Files are made before it is their turn and ended behind those that follow; what goes wrong there
ends the job."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import Tensor

import adapterkit
from adapterkit.core.checkpoint.layout import TensorPlan, laid_out
from adapterkit.core.engine import computed, file_threads, local
from adapterkit.core.engine.file_threads import FileThreads
from adapterkit.core.execute import run
from adapterkit.core.output.folder_output import FolderOutput
from adapterkit.core.output.stage import Stage
from adapterkit.core.output.writer import ShardFile
from adapterkit.core.plan import OutputFile
from tests.support.card import Card, CardTensor, installed

LONG = 20.0  # seconds; nobody waits that long where all is well


def weights(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*.safetensors")}


def quantize(out: Path, **options) -> None:
    adapterkit.quantize("base", to="nf4", out=out, **options)


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The computed files that were begun, in order."""
    names, real = [], local.write_computed

    def note(file: OutputFile, *arguments, **options) -> None:
        names.append(file.file)
        real(file, *arguments, **options)

    monkeypatch.setattr(local, "write_computed", note)
    return names


def test_a_computed_file_is_hashed_while_the_next_one_is_made(
    begun: list[str], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    quantize(tmp_path / "before")
    assert len(begun) == 2
    begun.clear()
    real, together, turn = computed._results, [], threading.Event()

    def results(file: OutputFile, *arguments) -> Iterator:
        if len(begun) == 2:
            turn.set()
        return real(file, *arguments)

    def hash_of(*arguments) -> tuple:
        together.append(turn.wait(LONG))
        return hashed(*arguments)

    hashed = computed.hash_of
    monkeypatch.setattr(computed, "_results", results)
    monkeypatch.setattr(computed, "hash_of", hash_of)
    quantize(tmp_path / "out")
    assert together == [True, True]
    assert weights(tmp_path / "out") == weights(tmp_path / "before")


def test_a_file_waits_for_what_those_before_it_hand_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    ended, needed, finish, begin = [], {}, FileThreads._finish, local.write_computed
    both = threading.Event()  # files of the base are begun

    def end_late(files: FileThreads, file: ShardFile, end) -> None:
        assert both.wait(LONG)
        threading.Event().wait(0.1)
        finish(files, file, end)
        ended.append(file.final.name)

    def write(file: OutputFile, *arguments, **options) -> None:
        needed[Path(file.file).name] = bool(file.handoff_reads), list(ended)
        if len(needed) == 2:
            both.set()
        begin(file, *arguments, **options)

    monkeypatch.setattr(FileThreads, "_finish", end_late)
    monkeypatch.setattr(local, "write_computed", write)
    adapterkit.loftq("base", rank=2, out=tmp_path / "out")
    *bases, adapter = needed
    assert needed[adapter] == (True, bases)
    assert [needed[name] for name in bases] == [(False, []) for _ in bases]


def test_files_that_wait_for_their_end_are_few(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A job that is killed makes them again."""
    monkeypatch.setattr(file_threads, "BEHIND", 1)
    release, ended, stage = threading.Event(), [], Stage(FolderOutput(tmp_path / "out"))
    with file_threads.file_threads(stage, ended.append) as files:
        for number in range(2):
            file = files.create(f"{number}", 1)
            files.finish(f"{number}", file, lambda number=number: release.wait(LONG) and number)
        threading.Timer(0.05, release.set).start()
        files.await_ends(())
        assert ended[:1] == [0]
    assert ended == [0, 1]
    assert sorted(p.name for p in stage.path.iterdir()) == ["0", "1"]


def test_a_file_that_cannot_be_ended_ends_the_job(
    begun: list[str], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(file: ShardFile) -> None:
        raise OSError("the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(ShardFile, "sync", fail)
        with pytest.raises(OSError, match="the disk is gone"):
            adapterkit.loftq("base", rank=2, out=tmp_path / "out")
    assert len(begun) <= 2  # not the adapter, which needs them
    adapterkit.loftq("base", rank=2, out=tmp_path / "out", resume=True)


def test_a_hash_ends_when_the_job_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(computed, "BLOCK", 64)
    layout = laid_out("x", [TensorPlan("x", "U8", (4096,))], {})
    file, stop, read = ShardFile(tmp_path, "x", layout.size), threading.Event(), []
    real = ShardFile.read

    def note(file: ShardFile, *arguments) -> None:
        read.append(arguments)
        if len(read) == 3:
            stop.set()
        real(file, *arguments)

    monkeypatch.setattr(ShardFile, "read", note)
    computed.hash_of(file, layout, stop)
    assert len(read) == 3


def test_the_next_file_gets_its_blocks_while_one_is_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """On tmpfs that takes as long as writing them."""
    working, met, do, allocate = threading.Event(), [], local._ShardRun._do, ShardFile._allocate

    def note(job: local._ShardRun, *arguments) -> None:
        working.set()
        do(job, *arguments)

    def give(file: ShardFile, size: int) -> None:
        if met:
            met.append(working.wait(LONG))
        met.append(True)
        allocate(file, size)

    monkeypatch.setattr(local._ShardRun, "_do", note)
    monkeypatch.setattr(ShardFile, "_allocate", give)
    plan = adapterkit.merge("base", ["style"], out=tmp_path / "out", dry_run=True)
    assert len(plan.shards) > 1
    run(plan, Stage(FolderOutput(tmp_path / "out")), local.local(workers=1))
    assert len(met) > len(plan.shards) and all(met)


def test_results_leave_a_gpu_through_pinned_buffers(folder: Path, tmp_path: Path, monkeypatch):
    """Nothing that is written waits for the card as pageable memory does; what is smaller than a
    row is a measure."""
    quantize(tmp_path / "here")
    copied, real = [], Card._copy

    def note(card: Card, to: Tensor, source: Tensor, non_blocking: bool = False):
        if isinstance(source, CardTensor) and not isinstance(to, CardTensor) and to.numel() > 16:
            copied.append(non_blocking and card.is_pinned(to))
        return real(card, to, source, non_blocking)

    monkeypatch.setattr(Card, "_copy", note)
    with installed(Card()) as card:
        quantize(tmp_path / "there", device="cuda")
    assert copied and all(copied)
    assert not card.races
    assert weights(tmp_path / "there") == weights(tmp_path / "here")


def test_threads_that_the_system_does_not_allow_end_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with (
        pytest.raises(RuntimeError, match="new thread"),
        file_threads.file_threads(Stage(FolderOutput(tmp_path / "out")), print) as files,
    ):
        files.start(lambda: None)

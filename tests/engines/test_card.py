"""The local engine on a pretended card: the same bytes as on the CPU, and no races."""

import contextlib
import math
import shutil
import threading
import time
from pathlib import Path

import pytest

from adapterkit.core.engine import buffers, local
from adapterkit.core.engine import partition as pieces
from adapterkit.core.execute import run
from adapterkit.core.output.folder_output import FolderOutput
from adapterkit.core.output.stage import Stage
from adapterkit.core.tasks import edits, rows
from adapterkit.kernels import dense
from tests.golden import jobs
from tests.support.card import Card, installed
from tests.support.usual import usual

SMALL = 256  # elements of a chunk, so that steps have many
RECEIPT = "adapterkit.json"
STATS = {"data": "ids.jsonl", "targets": "q_proj,v_proj,down_proj"}
# autograd in C++ believes the card's tensors to be the CPU's: no gradients
JOBS = [
    *(job for job in jobs.WRITING if job.verb != "stats"),
    jobs.job("stats-pca", "base32", what="covariance,mean,pca", batch=2, **STATS),
    jobs.job("stats-whole", "base32", what="covariance", whole_model=True, batch=2, **STATS),
]
QUICK = (
    "merge-several", "merge-nf4", "loftq-nf4", "init-quantized", "extract-rank", "stats-pca",
    "stats-whole",
)  # fmt: skip


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    """Equal ones on both devices: then products have the same bits; and one way to a QR, as signs
    depend on it."""
    monkeypatch.setattr(dense, "THIN", math.inf)
    monkeypatch.setattr(rows, "ELEMENTS", SMALL)
    monkeypatch.setattr(rows, "CUDA_ELEMENTS", SMALL)


def make(name: str) -> jobs.Job:
    """The job of that name; the outputs that it reads are there."""
    found = next(job for job in JOBS if job.name == name)
    for source in (*found.sources, *found.options.values()):
        if any(source == job.name for job in jobs.WRITING) and not Path(source).exists():
            jobs.call(make(source), out=source)
    return found


def bytes_of(folder: Path) -> dict[str, bytes]:
    if folder.is_file():
        return {"": folder.read_bytes()}
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != RECEIPT]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def assert_same_there(name: str, folder: Path, card: Card, **options) -> None:
    job = make(name)
    suffix = jobs.output_of(job).suffix
    there, here = (folder / f"{place}{suffix}" for place in ("there", f"{name}-here"))
    if not here.exists():
        jobs.call(job, out=str(here))
    try:
        with installed(card):
            jobs.call(job, out=str(there), device="cuda", **options)
        assert not card.races, card.races[:3]
        assert bytes_of(there) == bytes_of(here)
    finally:
        shutil.rmtree(there, ignore_errors=True)
        for file in folder.glob("there*.*"):
            file.unlink()


@pytest.mark.parametrize("name", usual([job.name for job in JOBS], QUICK))
def test_a_job_gives_the_bytes_of_the_cpu(name: str, folder: Path):
    """Each is computed there, in streams that are not the default one."""
    card = Card()
    assert_same_there(name, folder, card)
    # `convert` hands on stored bytes; a model runs in the default stream
    if not name.startswith(("convert", "stats")):
        assert card.streams_used - {card.default.number}
    assert card.streams_used


def run_together(monkeypatch: pytest.MonkeyPatch, name: str, folder: Path) -> Card:
    """A job by two workers, which use what one of them has just loaded before either waits."""
    both, load, landed = threading.Barrier(2), pieces.OpenStep.load, local.ComputedChunk.landed

    def load_together(*arguments) -> list:
        edits = load(*arguments)
        with contextlib.suppress(threading.BrokenBarrierError):  # the other has no more to do
            both.wait(0.1)
        both.reset()
        return edits

    def land_later(*arguments) -> list:
        time.sleep(0.01)
        return landed(*arguments)

    monkeypatch.setattr(pieces.OpenStep, "load", load_together)
    monkeypatch.setattr(local.ComputedChunk, "landed", land_later)
    monkeypatch.setattr(rows, "CUDA_ELEMENTS", SMALL // 4)
    job, out, card = make(name), folder / "together", Card()
    with installed(card):
        plan = jobs.call(job, out=str(out), dry_run=True)
        run(plan, Stage(FolderOutput(out)), local.local("cuda", workers=2))
    shutil.rmtree(out)
    return card


@pytest.mark.parametrize(
    "name", usual(["merge-several", "merge-head", "merge-peft"], {"merge-several", "merge-peft"})
)
def test_workers_wait_for_the_factors_that_another_loads(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    assert not run_together(monkeypatch, name, folder).races


def test_the_pretended_card_sees_factors_that_are_not_waited_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(pieces.Mark, "precede", lambda mark: None)
    monkeypatch.setattr(edits.kernel, "low_rank_norm", lambda left, right: 0.0)  # it waits
    races = run_together(monkeypatch, "merge-several", folder).races
    assert any("does not wait for" in race for race in races)


def test_the_pretended_card_sees_memory_that_is_read_into_too_early(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(buffers.StagingBuffers, "_next_buffer", lambda own: own.staging[0])
    card = run_together(monkeypatch, "merge-several", folder)
    assert any("written during the copy" in race for race in card.races)


CHUNK = {"launches": 6, "transfers": 3, "waits": 1}  # a copy in, two out; one event
STEP = {"launches": 36, "transfers": 5, "waits": 5}  # its factors, and a chunk that is measured


def costs_of(elements: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """What a merge with chunks of so many elements costs the host."""
    made, card = {"chunks": 0, "steps": 0}, Card()
    compute, begin = local.compute_chunk, pieces.OpenStep.__init__

    def counted(*arguments) -> local.ComputedChunk:
        made["chunks"] += 1
        return compute(*arguments)

    def begun(*arguments) -> None:
        made["steps"] += 1
        begin(*arguments)

    with monkeypatch.context() as patch, installed(card):
        patch.setattr(local, "compute_chunk", counted)
        patch.setattr(pieces.OpenStep, "__init__", begun)
        patch.setattr(pieces, "SAMPLE", 10**9)
        patch.setattr(rows, "CUDA_ELEMENTS", elements)
        plan = jobs.call(make("merge-plain"), out="counted", dry_run=True, device="cuda")
        run(plan, Stage(FolderOutput(Path("counted"))), local.local("cuda", workers=1))
    shutil.rmtree("counted")
    return {name: getattr(card, name) for name in CHUNK} | made


def test_a_merge_costs_the_host_little(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """A chunk: what half the elements cost more; a step: what one whole chunk each costs."""
    few, many, whole = (costs_of(n, monkeypatch) for n in (SMALL, SMALL // 2, 1 << 20))
    more = many["chunks"] - few["chunks"]
    assert more > 10 and whole["chunks"] == whole["steps"]
    for name, most in CHUNK.items():
        assert many[name] - few[name] <= most * more, (name, few, many)
    for name, most in STEP.items():
        assert whole[name] <= most * whole["steps"], (name, whole)

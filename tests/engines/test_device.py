"""What a run on a card sets, refuses, notes and falls back to, on a pretended card."""

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import adapterkit
from adapterkit.core.checkpoint.folder import LocalFolder
from adapterkit.core.checkpoint.reader import Sources
from adapterkit.core.checkpoint.spec import open_checkpoint
from adapterkit.core.engine import device, local
from adapterkit.core.engine.cost import Work
from adapterkit.core.engine.device import memory_errors
from adapterkit.core.engine.reader import LocalReader
from adapterkit.core.errors import Failed, Refused
from adapterkit.core.execute import run
from adapterkit.core.output.folder_output import FolderOutput
from adapterkit.core.output.stage import Stage
from adapterkit.verbs.stats import sums
from adapterkit.verbs.stats.collect import InputStatistics
from tests.support.card import DEVICE, WORKSPACE, Card, installed

CPU = torch.device("cpu")
KIND = f"cuda pretended card, torch {torch.__version__}"


@pytest.fixture
def card() -> Iterator[Card]:
    with installed(Card()) as card:
        yield card


def merge(out: Path, **options) -> Any:
    return adapterkit.merge("base", ["style"], out=out, **options)


def weights(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.glob("*.safetensors")}


def precisions() -> list[object]:
    """The settings of products of float32 by the newer names and, where torch lets them be read, by
    the older ones."""
    try:
        older = [torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32]
    except RuntimeError:
        older = []
    return [*(part.fp32_precision for part in device.precisions()), *older]


@pytest.fixture
def precision() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")
    for part in device.precisions():
        part.fp32_precision = "none"


def set_older() -> None:
    torch.set_float32_matmul_precision("medium")


def set_newer() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"


def set_both() -> None:
    set_older()
    set_newer()


@pytest.mark.parametrize("set_precision", [set_older, set_newer, set_both, lambda: None])
@pytest.mark.parametrize("where", [CPU, DEVICE])
def test_products_are_of_float32_whatever_the_caller_has_set(
    where: torch.device, set_precision: Callable[[], None], precision: None
):
    if not device.precisions() and set_precision is set_newer:
        pytest.skip("before torch 2.9")
    set_precision()
    before = precisions()
    with device.exact_arithmetic(where):
        assert torch.get_float32_matmul_precision() == "highest"
        assert not torch.backends.cuda.matmul.allow_tf32
        assert all(part.fp32_precision == "ieee" for part in device.precisions())
    assert precisions() == before


def test_the_engine_computes_in_float32(folder: Path, tmp_path: Path, monkeypatch):
    seen, real = [], local.compute_chunk

    def compute(*arguments):
        seen.append([part.fp32_precision for part in device.precisions()])
        return real(*arguments)

    monkeypatch.setattr(local, "compute_chunk", compute)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        merge(tmp_path / "out")
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen and all(set(one) <= {"ieee"} for one in seen)


def test_sums_on_a_card_are_the_same_every_time(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with device.exact_arithmetic(DEVICE):
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert not torch.are_deterministic_algorithms_enabled()
    with device.exact_arithmetic(CPU):
        assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("name", device.SHORTENING)
def test_an_environment_that_shortens_floats_is_refused(
    name: str, card: Card, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(name, "1")
    with pytest.raises(Refused, match=name):
        merge(tmp_path / "out", device="cuda")
    assert not any(tmp_path.iterdir())
    merge(tmp_path / "out")  # not the CPU's concern
    monkeypatch.setenv(name, "0")
    merge(tmp_path / "out", dry_run=True, device="cuda", overwrite=True)


NO_KERNELS = "CUDA error: no kernel image is available for execution on the device\nCUDA kernel ..."
UNUSABLE = {
    "without kernels": (NO_KERNELS, "no kernel image"),
    "another's alone": ("CUDA error: all CUDA-capable devices are busy", "are busy"),
    "an old driver": (torch.cuda.DeferredCudaCallError("driver too old"), "driver too old"),
}


@pytest.mark.parametrize("case", UNUSABLE)
@pytest.mark.parametrize("verb", ["merge", "quantize", "stats"])
def test_a_card_that_does_not_compute_is_refused_or_left_alone(
    verb: str, case: str, card: Card, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: object) -> None:
        raise error

    error, text = UNUSABLE[case]
    if isinstance(error, str):
        card.fails = error
    else:
        monkeypatch.setattr(torch.cuda, "mem_get_info", fail)
    monkeypatch.setattr(Work, "gains", lambda job, machine: job.has_tasks)  # which a merge has not
    arguments: dict[str, Any] = {
        "merge": {"adapters": ["style"]},
        "quantize": {"to": "nf4"},
        "stats": {"targets": "q_proj", "data": "ids.jsonl", "samples": 2, "length": 8},
    }[verb]
    run_verb, out = getattr(adapterkit, verb), tmp_path / "out.safetensors"
    with pytest.raises(Refused, match=text) as refused:
        run_verb("base", out=out, device="cuda", **arguments)
    assert "CUDA kernel" not in str(refused.value) and not any(tmp_path.iterdir())
    receipt = run_verb("base", out=out, **arguments)
    assert "device" not in receipt.data
    assert any(text in note for note in receipt.data["notes"]) == (verb != "merge")


@pytest.mark.parametrize("more", [{}, {"whole_model": True}, {"what": "pca"}])
def test_statistics_of_a_full_card_end_cleanly_and_auto_leaves_it_alone(
    more: dict[str, Any], folder: Path, tmp_path: Path
):
    options = {
        "data": "ids.jsonl",
        "targets": "q_proj",
        "out": tmp_path / "out.safetensors",
        **more,
    }
    with installed(Card(memory=1 << 14)):
        with pytest.raises(Failed, match="out of memory") as failed:
            adapterkit.stats("base", device="cuda", **options)
        assert "--device cpu --overwrite" in str(failed.value)
        receipt = adapterkit.stats("base", overwrite=True, **options)
    assert "device" not in receipt.data


def test_a_card_that_computes_wrongly_is_refused(card: Card, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch, "ones", torch.zeros)
    with pytest.raises(Refused, match="1 \\+ 1 \\+ 1 = 0"):
        device.pick_device("cuda")


def test_memory_that_cannot_be_pinned_is_used_unpinned(card: Card, folder: Path, tmp_path: Path):
    merge(tmp_path / "pinned", device="cuda")
    assert card.pinned_buffers
    card.fails_to_pin, card.pinned_buffers = True, 0
    merge(tmp_path / "pageable", device="cuda")
    assert not card.pinned_buffers and not card.races
    assert weights(tmp_path / "pageable") == weights(tmp_path / "pinned")


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: out of memory")],
)
def test_a_card_that_is_full_ends_cleanly_and_resumes(
    error: Exception, card: Card, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(local, "compute_chunk", fail)
        with pytest.raises(Failed, match="out of memory") as raised:
            merge(tmp_path / "out", device="cuda")
    assert "--resume" in str(raised.value) and "--device cpu --overwrite" in str(raised.value)
    with pytest.raises(Refused, match="another device") as refused:
        merge(tmp_path / "out", resume=True)
    assert KIND in str(refused.value)
    receipt = merge(tmp_path / "out", device="cuda", resume=True)
    assert receipt.data["device"] == KIND


CUBLAS = "CUDA error: CUBLAS_STATUS_{} when calling `cublasCreate(handle)`"


@pytest.mark.parametrize(
    ("text", "is_certain"),
    [
        ("CUDA driver error: out of memory", True),
        (CUBLAS.format("ALLOC_FAILED"), True),
        (CUBLAS.format("NOT_INITIALIZED"), False),
        ("cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnCreate`", False),
        ("cusolver error: 7, when calling `cusolverDnCreate(handle)`", False),
        ("NVML_SUCCESS == r INTERNAL ASSERT FAILED at CUDACachingAllocator.cpp", False),
    ],
)
def test_texts_of_a_full_gpu_are_one_error(
    text: str, is_certain: bool, card: Card, folder: Path, tmp_path: Path, monkeypatch
):
    """Texts of other faults, too, are of a full one where little is free."""

    def fail(*_):
        raise RuntimeError(text)

    monkeypatch.setattr(local, "compute_chunk", fail)
    with pytest.raises(Failed if is_certain else RuntimeError, match=re.escape(text)):
        merge(tmp_path / "out", device="cuda")
    card.taken[0] = card.memory - (1 << 29)
    with pytest.raises(Failed, match="out of memory: " + re.escape(text)):
        merge(tmp_path / "out", device="cuda", overwrite=True)
    card.fails = "CUDA error: an illegal memory access was encountered"  # an error that stays
    with pytest.raises(RuntimeError), memory_errors(DEVICE):
        raise RuntimeError("CUSOLVER_STATUS_INTERNAL_ERROR")


def test_an_allocation_that_fails_on_the_cpu_is_out_of_memory():
    with pytest.raises(Failed, match="out of memory: .*can't allocate"), memory_errors(CPU):
        torch.empty(1 << 60, dtype=torch.uint8)
    with pytest.raises(RuntimeError), memory_errors(CPU):
        raise RuntimeError(CUBLAS.format("NOT_INITIALIZED"))


def test_a_run_of_the_cpu_is_not_resumed_on_a_card(
    card: Card, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patch:
        patch.setattr(local, "compute_chunk", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            merge(tmp_path / "out")
    with pytest.raises(Refused, match="another device: cpu"):
        merge(tmp_path / "out", device="cuda", resume=True)
    assert "device" not in merge(tmp_path / "out", resume=True).data


def test_totals_say_what_a_card_takes(card: Card, folder: Path, tmp_path: Path):
    here, there = (
        merge(tmp_path / "out", dry_run=True, device=name).totals() for name in ("cpu", "cuda")
    )
    assert there["device_memory"] > 0 and there["pinned_memory"] > 0
    assert here == {k: n for k, n in there.items() if k not in ("device_memory", "pinned_memory")}


def test_a_small_card_has_fewer_workers(
    card: Card, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    made, real = [], local._ShardRun.__init__

    def init(job, shards, largest, sources, device, workers, *rest):
        made.append(workers)
        real(job, shards, largest, sources, device, workers, *rest)

    monkeypatch.setattr(local._ShardRun, "__init__", init)
    plan = merge(tmp_path / "out", dry_run=True, device="cuda")
    card.memory, card.workspace = plan.totals()["device_memory"] // 4, 0
    run(plan, Stage(FolderOutput(tmp_path / "out")), local.local("cuda", workers=64))
    assert made == [1]
    card.memory = 80 << 30
    run(plan, Stage(FolderOutput(tmp_path / "out")), local.local("cuda", workers=3), overwrite=True)
    assert made == [1, 3]


def test_a_stack_that_is_dropped_is_kept_for_the_streams_that_read_it(card: Card, folder: Path):
    checkpoint = open_checkpoint(LocalFolder(Path("base")))
    spec = next(iter(checkpoint.tensors.values()))
    with Sources((checkpoint.folder,), {}) as sources, torch.inference_mode():
        reader = LocalReader(sources, DEVICE)
        for _ in range(2):  # loaded by one, read by both
            with torch.cuda.stream(torch.cuda.Stream()):
                reader.shared(spec, lambda stack: stack + 1).double()
        reader.stacks.stacks.clear()
    assert not card.races, card.races


@pytest.mark.parametrize(("memory", "there"), [(1 << 30, True), (WORKSPACE + (1 << 20), False)])
def test_components_are_made_where_half_of_the_card_holds_them(
    memory: int, there: bool, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(InputStatistics, "memory", 20 << 20)
    seen: set[str] = set()
    real = sums.truncated.principal_components

    def components(covariance: Tensor, mean: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        seen.add(covariance.device.type)
        return real(covariance, mean, count)

    monkeypatch.setattr(sums.truncated, "principal_components", components)
    with installed(Card(memory)):
        adapterkit.stats(
            "base", data="ids.jsonl", targets="q_proj", what="pca", out=tmp_path / "s.safetensors",
            device="cuda",
        )  # fmt: skip
    assert seen == {"cuda" if there else "cpu"}

"""The memory that workers read into: reused, page-locked where a pretended card copies from it, no
more of it than a plan says, and what is read through it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import adapterkit
from adapterkit.core.budget import GPU_TASKS, pinned_size
from adapterkit.core.checkpoint.folder import LocalFolder
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.checkpoint.reader import Sources
from adapterkit.core.checkpoint.spec import open_checkpoint
from adapterkit.core.engine import buffers, local
from adapterkit.core.engine.buffers import own_staging
from adapterkit.core.engine.execution import stage_of
from adapterkit.core.engine.reader import LocalReader
from adapterkit.core.errors import Unrecoverable
from adapterkit.core.execute import run
from adapterkit.core.output.folder_output import FolderOutput
from adapterkit.core.output.stage import Stage
from adapterkit.core.tasks import rows
from tests.golden import jobs
from tests.support.card import DEVICE, Card, installed

CPU = torch.device("cpu")
WHOLE = (96, 65)  # many buffers of 256 bytes, the last one not full


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[LocalFolder, dict[str, Tensor]]:
    """A checkpoint of a tensor of each dtype, one without elements and a scalar."""
    path = tmp_path_factory.mktemp("stored")
    torch.manual_seed(0)
    numbers = 40 * torch.randn(WHOLE)
    dtypes = (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn)
    tensors = {str(dtype): numbers.to(dtype) for dtype in (*dtypes, torch.int8, torch.bool)}
    tensors |= {"none": torch.empty(0, 3), "one": torch.tensor(2.5), "nan": numbers.clone()}
    tensors["nan"][-1, -1] = torch.nan
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text("{}")
    return LocalFolder(path), load_file(path / "model.safetensors")


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "STAGING_SIZE", 256)
    monkeypatch.setattr(buffers, "CACHED", 256)


def all_read(
    folder: LocalFolder, device: torch.device, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """Each tensor but the one that is not finite, twice."""
    specs = open_checkpoint(folder).tensors
    with Sources((folder,), {}) as sources, torch.inference_mode(), own_staging(device):
        reader = LocalReader(sources, device, dtype)
        read = [{k: reader.tensor(spec) for k, spec in specs.items() if k != "nan"} for _ in "12"]
        with pytest.raises(Unrecoverable, match="nan: values are not finite"):
            reader.tensor(specs["nan"])
    assert all(torch.equal(read[0][key].cpu(), tensor.cpu()) for key, tensor in read[1].items())
    return {key: tensor.cpu() for key, tensor in read[0].items()}


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float64])
@pytest.mark.parametrize("device", [CPU, DEVICE])
def test_tensors_read_in_parts_equal_the_stored_ones(
    device: torch.device, dtype: torch.dtype | None, stored: tuple[LocalFolder, dict[str, Tensor]]
):
    with installed(Card()) as card:
        read = all_read(stored[0], device, dtype)
    for key, tensor in read.items():
        expected = stored[1][key] if dtype is None else stored[1][key].to(dtype)
        assert tensor.dtype == expected.dtype
        assert torch.equal(tensor.view(-1).view(torch.uint8), expected.view(-1).view(torch.uint8))
    assert not card.races


def spec_of(stored: tuple[LocalFolder, dict[str, Tensor]], key: str) -> TensorSpec:
    return open_checkpoint(stored[0]).tensors[key]


def test_a_read_to_a_gpu_waits_for_a_free_staging_buffer_and_for_the_check_of_finite_values(
    stored: tuple[LocalFolder, dict[str, Tensor]],
):
    """Copies do not block: from the third buffer on, for the copy two buffers before; then once."""
    spec = spec_of(stored, "torch.float32")
    with (
        installed(Card()) as card,
        Sources((stored[0],), {}) as sources,
        torch.inference_mode(),
        torch.cuda.stream(torch.cuda.Stream()),
        own_staging(DEVICE),
    ):
        reader = LocalReader(sources, DEVICE)
        reader.tensor(spec)
        parts = -(-spec.nbytes // 256)
        assert card.transfers == parts
        assert card.waits == parts - 2 + 1
        reader.tensor(spec)
    assert card.pinned_buffers == 2 and card.pinned_bytes == 2 * 256
    assert not card.races


def test_rows_are_read_into_reused_memory(stored: tuple[LocalFolder, dict[str, Tensor]]):
    with Sources((stored[0],), {}) as sources, own_staging(CPU) as staging:
        for key in ("torch.bfloat16", "torch.float32"):
            spec, places = spec_of(stored, key), set()
            for first, last in ((0, 5), (5, 7), (90, 96)):
                memory = staging.kept((last - first, 65), torch.float32)
                read = LocalReader(sources, CPU).rows(spec, WHOLE, first, last, memory)
                assert torch.equal(read, stored[1][key][first:last].float())
                places.add(read.data_ptr())
            assert len(places) <= 2  # the last one is the largest


@pytest.mark.parametrize(
    ("name", "kinds"), [("merge-several", 2), ("quantize-nf4", 1), ("stats-all", 1)]
)
def test_a_plan_counts_its_page_locked_memory(
    name: str, kinds: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """All of it at once, and no more later: what is pinned is never given back."""
    monkeypatch.setattr(rows, "CUDA_ELEMENTS", 512)
    monkeypatch.setattr("adapterkit.core.engine.partition.RUN", 128)
    monkeypatch.setattr(buffers, "STAGING_SIZE", 2048)
    monkeypatch.setattr("adapterkit.core.engine.placement.STAGING_SIZE", 2048)
    monkeypatch.setattr("adapterkit.core.engine.placement.all_cores", lambda: 3)
    sizes, empty = [], torch.empty

    def allocate(*shape, **options) -> Tensor:
        if options.get("pin_memory"):
            sizes.extend(shape)
        return empty(*shape, **options)

    monkeypatch.setattr(torch, "empty", allocate)
    job = next(job for job in jobs.WRITING if job.name == name)
    if job.verb == "stats":  # the card has no gradients
        job = replace(job, options=job.options | {"what": "covariance,mean"})
    out = tmp_path / "out.safetensors"
    with installed(Card()) as card:
        plan = jobs.call(job, out=out, device="cuda", dry_run=True)
        run(plan, stage_of(plan, out), local.local("cuda", workers=3))
    assert card.pinned_bytes == sum(sizes) <= plan.totals()["pinned_memory"]
    assert all(size == pinned_size(size) for size in sizes)
    assert len(set(sizes)) == kinds


def test_a_gpu_gets_a_worker_for_each_core(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As many files in the making, and hashes; on the CPU eight would wait for the disk."""
    runs, init = [], local._ShardRun.__init__

    def note(run, *arguments) -> None:
        init(run, *arguments)
        runs.append((run.workers, run.slots._value))

    monkeypatch.setattr(local._ShardRun, "__init__", note)
    monkeypatch.setattr(local, "all_cores", lambda: 11)
    monkeypatch.setattr(local, "cores", lambda: 2)
    with installed(Card()):
        adapterkit.merge("base", ["style"], out=tmp_path / "there", device="cuda")
    adapterkit.merge("base", ["style"], out=tmp_path / "here")
    assert runs == [(11, 12), (2, 9)]  # one is made ahead


@pytest.mark.parametrize("job", ["merge", "quantize"])
def test_jobs_of_a_process_share_their_streams(job: str, folder: Path, tmp_path: Path):
    """Memory that one of them has freed serves no other, and each has one of cuBLAS."""
    used = []
    with installed(Card()) as card:
        for number in range(3):
            if job == "merge":
                plan = adapterkit.merge("base", ["style"], out=tmp_path / "out", dry_run=True)
            else:
                plan = adapterkit.quantize("base", to="nf4", out=tmp_path / "out", dry_run=True)
            run(plan, Stage(FolderOutput(tmp_path / f"{number}")), local.local("cuda", workers=8))
            used.append(len(card.streams_used - {card.default.number}))
            card.streams_used.clear()
        rings = {len(ring) for ring in card.rings.values()}
    most = 8 if job == "merge" else GPU_TASKS + 1  # and of who writes
    assert max(used) <= most and max(rings) <= most

"""Large weights in narrow formats: worked on by slices of rows, in the memory that the plan claims,
to the bytes of the whole."""

import math
import threading
import time
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import adapterkit
from adapterkit.bases.quantized.codecs.bnb4 import Bnb4
from adapterkit.bases.quantized.codecs.bnb8 import Bnb8
from adapterkit.bases.quantized.codecs.compressed import Compressed
from adapterkit.bases.quantized.codecs.fp8 import Fp8
from adapterkit.bases.quantized.codecs.mxfp4 import Mxfp4
from adapterkit.core.adapter.factors import Factors
from adapterkit.core.budget import BUFFERS
from adapterkit.core.checkpoint.folder import LocalFolder
from adapterkit.core.checkpoint.header import TensorSpec, read_header
from adapterkit.core.checkpoint.reader import Sources
from adapterkit.core.engine.file_threads import in_order
from adapterkit.core.engine.reader import LocalReader
from adapterkit.core.errors import Refused
from adapterkit.core.plan import RowEdit, Step
from adapterkit.core.system import cores
from adapterkit.core.tasks import rows as task_rows
from adapterkit.core.tasks.edits import AddLowRank, Band, Block, Decompose, PlacedFactors
from adapterkit.core.tasks.rows import EditedTensor, RequantizedWeight
from adapterkit.core.weights.codec import PlainWeight, QuantizedWeight
from adapterkit.kernels.quant.stochastic import Draws

MATRIX, STACK = (1536, 4096), (6, 1024, 1024)
SMALL = {MATRIX: (256, 384), STACK: (3, 96, 160), (6145, 1056): (259, 1056)}
FORMATS: dict[str, tuple[type[QuantizedWeight], str, tuple[int, ...], dict]] = {
    "nf4": (Bnb4, "nf4", MATRIX, {}),
    "double": (Bnb4, "nf4", MATRIX, {"double_quant": True}),
    "fp4 in blocks longer than a row": (Bnb4, "fp4", (6145, 1056), {"block_size": 4096}),
    "int8": (Bnb8, "int8", MATRIX, {}),
    "fp8": (Fp8, "fp8", MATRIX, {}),
    "w4a16": (Compressed, "w4a16", MATRIX, {}),
    "w8a16": (Compressed, "w8a16", MATRIX, {}),
    "mxfp4 rows": (Compressed, "mxfp4", MATRIX, {}),
    "mxfp4 experts": (Mxfp4, "mxfp4", STACK, {}),
}
WHOLE = {"nf4 turned": (Bnb4, "nf4", MATRIX, {}), "int8 turned": (Bnb8, "int8", MATRIX, {})}


class Case:
    """One weight in a format in a file, and LoRA factors in another."""

    def __init__(self, folder: Path, name: str, small: bool = False):
        record, target, shape, options = (FORMATS | WHOLE)[name]
        shape = SMALL[shape] if small else shape
        generator = torch.Generator().manual_seed(0)
        packed = record.for_encoding(
            target, PlainWeight("x.weight", shape, "BF16", name in WHOLE), options
        )
        assert packed is not None
        with torch.inference_mode():
            stored = packed.encode(torch.randn(packed.shape, generator=generator).mul_(0.02))
        save_file(stored, folder / "base.safetensors")
        rows, columns = math.prod(packed.shape[:-1]), packed.shape[-1]
        factors = {
            "a": torch.randn(8, columns, generator=generator),
            "b": torch.randn(rows, 8, generator=generator).mul_(0.002),
        }
        factors |= {
            "row": torch.rand(rows, generator=generator) + 1,
            "column": torch.rand(columns, generator=generator) + 1,
        }
        save_file(factors, folder / "factors.safetensors")
        self.folder, self.specs = LocalFolder(str(folder)), {}
        for file in ("base.safetensors", "factors.safetensors"):
            for spec in read_header(self.folder, file).tensors:
                self.specs[spec.key] = spec
        self.packed = replace(
            packed, parts=tuple(replace(part, **self.place(part.key)) for part in packed.parts)
        )
        self.grid = rows, columns

    def place(self, key: str) -> dict:
        spec: TensorSpec = self.specs[key]
        return {"shape": spec.shape, "file": spec.file, "start": spec.start, "stop": spec.stop}

    def step(self, dora: str | None = None, draws: Draws | None = None) -> Step:
        rows, columns = self.grid
        factors = Factors(
            module="m", kind="module", a=self.specs["a"], b=self.specs["b"], scale=1.0, rank=8
        )
        term = PlacedFactors(factors, (Block(Band(0, rows), Band(0, columns)),))
        edits: list[RowEdit] = [AddLowRank((term,))]
        if dora:
            by_columns, before = dora == "column", tuple(edits)
            edits.append(Decompose(self.specs[dora], Band(0, rows), by_columns, before))
        return Step(
            "x.weight", "BF16", self.packed.shape, self.packed, tuple(edits), rows, ("a",), draws
        )

    def compute(self, task):
        with Sources((self.folder,), {}) as sources, torch.inference_mode():
            return task.compute(LocalReader(sources, torch.device("cpu")))


def peak() -> int:
    """The most memory that was resident since the peak was set anew."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(),
    reason="the peak of memory is read from Linux's /proc",
)
@pytest.mark.parametrize("name", FORMATS | WHOLE)
def test_no_more_memory_than_claimed(name: str, tmp_path: Path) -> None:
    case = Case(tmp_path, name)
    step = case.step()
    for task in (RequantizedWeight(step.key, step), EditedTensor(step.key, step)):
        assert name in WHOLE or task.memory < 10 * math.prod(case.packed.shape), (
            "decoded whole it takes more"
        )
        Path("/proc/self/clear_refs").write_text("5")
        before = peak()
        case.compute(task)
        assert peak() - before < task.memory


@pytest.mark.parametrize(
    ("dora", "seed"), [(None, None), ("row", None), ("column", None), (None, 3)]
)
@pytest.mark.parametrize("name", FORMATS)
def test_slices_give_the_bytes_of_the_whole(
    name: str, dora: str | None, seed: int | None, tmp_path: Path, monkeypatch
) -> None:
    """Slices and the chunks of the edits end at different rows."""
    monkeypatch.setattr(task_rows, "ELEMENTS", 7777)
    case = Case(tmp_path, name, small=True)
    step, whole = (
        case.step(dora, None if seed is None else Draws.of(seed, "x.weight")),
        task_rows.SLICE,
    )
    result = {}
    for size in (whole, 5000, 50_000):
        monkeypatch.setattr(task_rows, "SLICE", size)
        slices = len(list(case.packed.row_ranges(size)))
        assert slices > 1 or size == whole
        tasks = (RequantizedWeight(step.key, step), EditedTensor(step.key, step))
        result[size] = [tensor for task in tasks for tensor in case.compute(task).tensors.values()]
    for size in (5000, 50_000):
        for ours, right in zip(result[size], result[whole], strict=True):
            assert ours.dtype == right.dtype and ours.shape == right.shape
            assert torch.equal(
                ours.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8)
            )


class Load:
    """How much of their claims tasks have in memory, from when they are made until they are
    written; if they meet, the first waits for a second one."""

    def __init__(self, monkeypatch, meet: bool):
        met = threading.Event()
        self.lock, self.now, self.most, self.together = threading.Lock(), 0, 0, 0
        self.running, real = 0, RequantizedWeight.compute

        def make(task: RequantizedWeight, inputs: LocalReader):
            with self.lock:
                self.now, self.running = self.now + task.memory, self.running + 1
                self.most, self.together = (
                    max(self.most, self.now),
                    max(self.together, self.running),
                )
                if self.together > 1:
                    met.set()
            if meet:
                met.wait(20)
            time.sleep(0.01)
            result = real(task, inputs)
            weakref.finalize(next(iter(result.tensors.values())), self.written, task.memory)
            with self.lock:
                self.running -= 1
            return result

        monkeypatch.setattr(RequantizedWeight, "compute", make)

    def written(self, memory: int) -> None:
        with self.lock:
            self.now -= memory


@pytest.fixture
def quantized(cached_folder, llama: Path) -> Path:
    return (
        cached_folder(
            "memory-nf4", lambda folder: adapterkit.quantize(llama, out=folder / "q", to="nf4")
        )
        / "q"
    )


def test_the_budget_bounds_what_is_made_at_a_time(
    quantized: Path, lora: Path, tmp_path: Path, monkeypatch
) -> None:
    """One at a time where no two fit; the plan's peak is what the claims add up to; the bytes are
    the same."""
    result, peaks = {}, {}
    for budget in (1, "40MB", "1GB"):
        plan = adapterkit.merge(
            quantized, [lora], out=tmp_path / str(budget), memory=budget, dry_run=True
        )
        with monkeypatch.context() as patch:
            load = Load(patch, meet=budget != 1 and cores() > 1)
            adapterkit.merge(quantized, [lora], out=tmp_path / str(budget), memory=budget)
        tasks = [
            b for shard in plan.shards for b in shard.tasks if isinstance(b, RequantizedWeight)
        ]
        result[budget] = (tmp_path / str(budget) / "model.safetensors").read_bytes()
        peaks[budget] = plan.totals()["memory_peak"] - BUFFERS * cores()
        assert load.now == 0 and len(tasks) == 14
        assert load.most <= peaks[budget] <= max(plan.budget, max(task.memory for task in tasks))
        assert (load.together == 1) == (budget == 1 or cores() == 1)
    assert result[1] == result["40MB"] == result["1GB"] and peaks[1] < peaks["1GB"]
    for wrong in (0, -1, "much"):
        with pytest.raises(Refused, match="--memory"):
            adapterkit.merge(quantized, [lora], out=tmp_path / "wrong", memory=wrong)


def test_results_in_order_within_the_budget() -> None:
    """What costs more than the budget comes alone; nothing is lost, an error included."""
    costs, lock, now, most = [3, 9, 1, 1, 20, 4, 4, 4, 0, 0, 5], threading.Lock(), 0, []

    def work(cost: int) -> int:
        nonlocal now
        with lock:
            now += cost
            most.append(now)
        if cost == 7:
            raise ZeroDivisionError
        return cost

    actual = []
    for cost in in_order(work, costs, 4, 10, lambda cost: cost):
        actual.append(cost)
        with lock:
            now -= cost
    assert actual == costs and max(most) == 20 and sorted(most)[-2] <= 10
    with pytest.raises(ZeroDivisionError):
        list(in_order(work, [1, 7, 1], 2, 10, lambda cost: cost))

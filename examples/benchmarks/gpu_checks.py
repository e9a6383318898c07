"""Steps of gpu.py that pass or fail: rounding, the same bits every time, limits."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import common
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import adapterkit
from adapterkit.core.engine import local, reader
from adapterkit.core.errors import AdapterkitError
from adapterkit.core.execute import run
from adapterkit.core.output.folder_output import FolderOutput
from adapterkit.core.output.stage import Stage
from adapterkit.core.tasks import rows

if TYPE_CHECKING:
    from gpu import Settings

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
NOISE = 1e-13  # of float64, in weights of about 1
ROUNDED = ("merge", "quantize", "dequantize", "convert")  # verbs whose outputs are rounded sums
ULP, SHARE = 1, 1e-4  # by how much the devices may differ, and in how many elements
MERGES = ("merge-several", "merge-head", "merge-peft")  # DoRA, whole values, token rows
REPEATS, WORKERS = 20, (1, 2, 8)
COVARIANCE = 1e-3  # of a bfloat16 model's statistics: activations differ in the last place
LATE = 50_000_000  # cycles that a stream sleeps: some 30 ms

KILLED = """
import sys
from adapterkit.cli import main
main(sys.argv[1:])
"""
CAPPED = """
import sys, torch, adapterkit
base, adapter, out, device, share = sys.argv[1:]
torch.cuda.set_per_process_memory_fraction(float(share))
try:
    adapterkit.merge(base, [adapter], out=out, device=device)
except adapterkit.AdapterkitError as error:
    sys.exit(f"refused or failed: {error}")
"""


def attempt(case: Callable[[], Any]) -> Any:
    """The result of a case, or its error, next to the figures of the others."""
    try:
        return case()
    except Exception as error:  # of any case
        traceback.print_exc()
        return {"failed": f"{type(error).__name__}: {error}"}


def right(settings: "Settings") -> dict:
    """Merges against float64 rounded once; every golden job on the device against the CPU."""
    from tests.golden import jobs

    shapes = [(1, 7), (3, 1), (701, 513), (64, 4096)]
    shapes += settings.pick([(1, (1 << 24) + 3), (3000, 8192)], [])
    return {
        "misrounded_share": {
            str(dtype): attempt(lambda dtype=dtype: limited(misrounded(settings, dtype, shapes)))
            for dtype in DTYPES
        },
        "jobs": {job.name: attempt(lambda job=job: unlike(settings, job.name))
                 for job in jobs.WRITING},
    }  # fmt: skip


def limited(share: float) -> Any:
    """A share of wrong elements; a failure if there are too many."""
    return share if share <= SHARE else {"share": share, "failed": f"above {SHARE}"}


def misrounded(settings: "Settings", dtype: torch.dtype, shapes: list[tuple[int, int]]) -> float:
    """The share of elements that are not W + 1.5 b@a in float64, rounded once."""
    folder = common.fresh(settings.work / "right")
    torch.manual_seed(0)
    weights, factors, exact = {}, {}, {}
    for number, (out, width) in enumerate(shapes):
        w = torch.randn(out, width).to(dtype)
        a, b = torch.randn(4, width) * 0.1, torch.randn(out, 4) * 0.1
        weights[f"m{number}.weight"] = w
        factors[f"base_model.model.m{number}.lora_A.weight"] = a
        factors[f"base_model.model.m{number}.lora_B.weight"] = b
        exact[f"m{number}.weight"] = (w.double() + 1.5 * b.double() @ a.double()).to(dtype)
    (folder / "base").mkdir()
    (folder / "adapter").mkdir()
    save_file(weights, folder / "base" / "model.safetensors")
    save_file(factors, folder / "adapter" / "adapter_model.safetensors")
    config = '{"peft_type": "LORA", "r": 4, "lora_alpha": 6}'
    (folder / "adapter" / "adapter_config.json").write_text(config)
    adapterkit.merge(
        folder / "base", [folder / "adapter"], out=folder / "out", device=settings.device,
        verify=True,
    )  # fmt: skip
    merged = load_file(folder / "out" / "model.safetensors")
    wrong = sum(int(is_off(merged[key], exact[key]).sum()) for key in exact)
    shutil.rmtree(folder)
    return wrong / sum(tensor.numel() for tensor in exact.values())


def is_off(actual: Tensor, exact: Tensor) -> Tensor:
    """Float64 is not rounded once more: there its own noise is allowed."""
    if exact.dtype == torch.float64:
        return (actual - exact).abs() > NOISE
    return actual != exact


# --- golden jobs ----------------------------------------------------------------------------------


@contextmanager
def golden_folder(settings: "Settings") -> Iterator[Path]:
    """A folder with the inputs of the golden jobs, the current one meanwhile."""
    from tests.golden import inputs

    folder = settings.work / "golden"
    if not folder.exists():
        with chdir(common.fresh(folder)):
            inputs.create_inputs(Path())
    with chdir(folder):
        yield folder


def golden_job(name: str) -> Any:
    """The job of that name; the outputs that it reads are there."""
    from tests.golden import jobs

    found = next(job for job in jobs.WRITING if job.name == name)
    names = {job.name for job in jobs.WRITING}
    for source in (*found.sources, *found.options.values()):
        if isinstance(source, str) and source in names and not Path(source).exists():
            jobs.call(golden_job(source), out=source)
    return found


def unlike(settings: "Settings", name: str) -> dict[str, Any]:
    """The share of elements by which a job's outputs on the device and the CPU differ by more than
    one unit in the last place, and the largest difference relative to the tensor's largest value;
    tensors that have another shape, as ranks by energy may.
    """
    from tests.golden import jobs

    with golden_folder(settings):
        job = golden_job(name)
        outs = [jobs.output_of(job).with_name(f"{kind}-{jobs.output_of(job).name}")
                for kind in ("here", "there")]  # fmt: skip
        for out, device in zip(outs, ("cpu", settings.device), strict=True):
            shutil.rmtree(out, ignore_errors=True)
            out.unlink(missing_ok=True)
            jobs.call(job, out=str(out), device=device)
        here, there = (tensors_of(out) for out in outs)
    assert here.keys() == there.keys()
    reshaped = [key for key in here if here[key].shape != there[key].shape]
    pairs = [(here[key], there[key]) for key in here if key not in reshaped]
    count = sum(tensor.numel() for tensor, _ in pairs)
    off = sum(int((steps_apart(a, b) > ULP).sum()) for a, b in pairs)
    worst = [
        float((a.double() - b.double()).abs().max() / a.double().abs().max().clamp_min(1e-300))
        for a, b in pairs
        if a.numel()
    ]
    result = {"share": off / max(count, 1), "largest": max(worst, default=0.0)}
    # the factors of a decomposition have signs and roundings of their library's
    wrong = job.verb in ROUNDED and (result["share"] > SHARE or reshaped)
    return result | ({"reshaped": reshaped} if reshaped else {}) | (
        {"failed": "values differ"} if wrong else {}
    )  # fmt: skip


def tensors_of(out: Path) -> dict[str, Tensor]:
    if out.is_file():
        return load_file(out)
    files = sorted(out.glob("*.safetensors"))
    return {f"{path.name} {key}": t for path in files for key, t in load_file(path).items()}


def steps_apart(a: Tensor, b: Tensor) -> Tensor:
    """The number of representable values between the elements of two tensors."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

    def order(x: Tensor) -> Tensor:
        bits = x.contiguous().view(integers[x.element_size()]).long()
        if not x.is_floating_point():
            return bits
        low = -(1 << (8 * x.element_size() - 1))
        return torch.where(bits < 0, low - bits, bits)  # -0 is 0, and what is below comes below

    return (order(a) - order(b)).abs()


# --- the same bits --------------------------------------------------------------------------------


def races(settings: "Settings") -> dict:
    """Hashes of one plan's outputs: with streams that are late, with any number of workers, with
    TF32 set outside, after a kill."""
    result: dict[str, Any] = {}
    with golden_folder(settings):
        for name in MERGES:
            result[name] = attempt(lambda name=name: {"late_streams": is_same_late(settings, name)})
    base, adapter = checkpoint(settings, settings.pick(0.5, 0.02), 16)
    hashes = [
        hash_of_merge(settings, base, adapter, workers)
        for workers in WORKERS
        for _ in range(settings.pick(REPEATS, 2))
    ]
    result["repeats"] = {"runs": len(hashes), "hashes": len(set(hashes))}
    with tf32_allowed():
        result["tf32_outside"] = hash_of_merge(settings, base, adapter, 2) == hashes[0]
    result["killed_and_resumed"] = stopped_and_resumed(settings, base, adapter, signal.SIGKILL)
    right = len(set(hashes)) == 1 and result["tf32_outside"] and result["killed_and_resumed"]
    right = right and all(result[name].get("late_streams") for name in MERGES)
    return result | ({} if right else {"failed": "not one hash"})


def is_same_late(settings: "Settings", name: str) -> bool:
    plain = hash_of(settings, name, 1)
    with late_streams(settings):
        return {hash_of(settings, name, 8) for _ in range(settings.pick(5, 1))} == {plain}


@contextmanager
def tf32_allowed() -> Iterator[None]:
    """As training scripts set it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def stats(settings: "Settings") -> dict:
    """Covariances on the device compared with the CPU's, also if the process allows TF32: the
    largest difference relative to the matrix's largest value."""
    base, _ = checkpoint(settings, settings.pick(2.0, 0.02), 16)
    draws, data = random.Random(0), settings.work / "tokens.jsonl"
    length = settings.pick(256, 32)
    rows = [[draws.randrange(1000) for _ in range(length)] for _ in range(settings.pick(32, 4))]
    data.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))

    def collected(device: str) -> dict[str, Tensor]:
        out = settings.work / "statistics.safetensors"
        adapterkit.stats(
            base, data=data, out=out, device=device, overwrite=True, length=length,
            what="covariance,gradient", samples=len(rows), targets="q_proj,down_proj",
        )  # fmt: skip
        return load_file(out)

    here, result = collected("cpu"), {}
    seconds = time.perf_counter()
    result["plain"] = apart(here, collected(settings.device))
    result["seconds_there"] = round(time.perf_counter() - seconds, 1)
    with tf32_allowed():
        result["tf32_outside"] = apart(here, collected(settings.device))
    worst = max(result["plain"], result["tf32_outside"])
    return {"covariance": result} | (
        {"failed": f"above {COVARIANCE}"} if worst > COVARIANCE else {}
    )


def apart(here: dict[str, Tensor], there: dict[str, Tensor]) -> float:
    assert here.keys() == there.keys()
    return max(
        float((there[key].double() - x.double()).abs().max() / x.double().abs().max())
        for key, x in here.items()
        if x.is_floating_point() and x.numel() and x.any()
    )


@contextmanager
def late_streams(settings: "Settings") -> Iterator[None]:
    """Factors are ready long after the host has gone on: who does not wait for them reads what was
    there before."""
    real = reader.LocalReader.tensor

    def tensor(inputs, spec) -> Tensor:
        if settings.on_gpu:
            torch.cuda._sleep(LATE)  # of torch's own tests of streams
        return real(inputs, spec)

    # by name, so that the type checker is told of no change
    setattr(reader.LocalReader, "tensor", tensor)  # noqa: B010
    try:
        yield
    finally:
        setattr(reader.LocalReader, "tensor", real)  # noqa: B010 (likewise)


def hash_of(settings: "Settings", name: str, workers: int) -> str:
    """The hash of a golden job's output, in small chunks."""
    from tests.golden import jobs

    elements, rows.CUDA_ELEMENTS = rows.CUDA_ELEMENTS, 64
    try:
        plan = jobs.call(golden_job(name), out="races", dry_run=True, device=settings.device)
        return hash_of_plan(plan, Path("races"), settings.device, workers)
    finally:
        rows.CUDA_ELEMENTS = elements


def hash_of_merge(settings: "Settings", base: Path, adapter: Path, workers: int) -> str:
    out = settings.work / "out"
    plan = adapterkit.merge(base, [adapter], out=out, dry_run=True, device=settings.device)
    return hash_of_plan(plan, out, settings.device, workers)


def hash_of_plan(plan: Any, out: Path, device: str, workers: int) -> str:
    shutil.rmtree(out, ignore_errors=True)
    receipt = run(plan, Stage(FolderOutput(out)), local.local(device, workers))
    shutil.rmtree(out)
    return hashlib.sha256(str(sorted(receipt.data["files"].items())).encode()).hexdigest()


def checkpoint(settings: "Settings", size: float, rank: int, shards: int = 4) -> tuple[Path, Path]:
    config = common.config_for(size)
    base = common.make_base(settings.work / f"base-{size:g}-{shards}", size, size / shards)
    adapter = common.make_adapter(
        settings.work / f"adapter-{size:g}-{rank}", config, "bfloat16", rank
    )
    return base, adapter


def stopped_and_resumed(settings: "Settings", base: Path, adapter: Path, sign: int) -> bool:
    """True if a merge stopped by a signal after its first file resumes to the same bytes."""
    whole, out = settings.work / "whole", settings.work / "stopped"
    for folder in (whole, out, out.with_name(".stopped.adapterkit")):
        shutil.rmtree(folder, ignore_errors=True)
    adapterkit.merge(base, [adapter], out=whole, device=settings.device)
    argv = ["merge", str(base), str(adapter), "--out", str(out), "--device", settings.device]
    env = os.environ | {"PYTHONPATH": str(common.REPOSITORY)}
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, *argv], env=env,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    stage = out.with_name(".stopped.adapterkit")
    while process.poll() is None and not list(stage.glob("out/*.safetensors")):
        time.sleep(0.001)
    with suppress(ProcessLookupError):
        process.send_signal(sign)
    process.wait()
    adapterkit.merge(base, [adapter], out=out, device=settings.device, resume=True)
    same = all(
        path.read_bytes() == (out / path.name).read_bytes() for path in whole.glob("*.safetensors")
    )
    shutil.rmtree(whole)
    shutil.rmtree(out)
    return same


# --- limits ---------------------------------------------------------------------------------------


def limits(settings: "Settings") -> dict:
    """A GPU that is nearly full, an interrupt, a resume on the other kind of device."""
    base, adapter = checkpoint(settings, settings.pick(2.0, 0.02), 16)
    result: dict[str, Any] = {
        "interrupted_and_resumed": stopped_and_resumed(settings, base, adapter, signal.SIGINT)
    }
    if settings.on_gpu:
        out = settings.work / "capped"
        argv = [str(base), str(adapter), str(out), settings.device, "0.001"]
        done = subprocess.run(
            [sys.executable, "-c", CAPPED, *argv], capture_output=True, text=True,
            env=os.environ | {"PYTHONPATH": str(common.REPOSITORY)},
        )  # fmt: skip
        result["little_memory"] = (done.stderr or "done").strip().splitlines()[-1]
        result["clean"] = "Traceback" not in done.stderr
        if done.returncode:
            try:
                adapterkit.merge(base, [adapter], out=out, resume=True, device="cpu")
                result["resume_on_the_cpu"] = "taken"
            except AdapterkitError as error:
                result["resume_on_the_cpu"] = str(error).splitlines()[0]
            adapterkit.merge(base, [adapter], out=out, resume=True, device=settings.device)
        shutil.rmtree(out)
    right = result["interrupted_and_resumed"] and result.get("clean", True)
    return result | ({} if right else {"failed": "see above"})

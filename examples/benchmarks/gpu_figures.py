"""Steps of gpu.py that give figures: copies, merges, decompositions, the runtime, other loaders."""

import hashlib
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import common
import torch
from gpu_checks import attempt, checkpoint, tensors_of
from torch import Tensor

import adapterkit
from adapterkit.core.checkpoint.folder import LocalFolder
from adapterkit.core.checkpoint.reader import Sources
from adapterkit.core.checkpoint.spec import open_checkpoint
from adapterkit.core.engine import device as devices
from adapterkit.core.engine import local
from adapterkit.core.engine.reader import LocalReader
from adapterkit.core.execute import run
from adapterkit.core.output.folder_output import FolderOutput
from adapterkit.core.output.stage import Stage
from adapterkit.kernels.lowrank.truncated import truncated_svd

if TYPE_CHECKING:
    from gpu import Settings

OVERRIDES = (
    "CUBLAS_EMULATE_DOUBLE_PRECISION", "CUBLAS_EMULATE_SINGLE_PRECISION",
    "CUBLAS_WORKSPACE_CONFIG", "CUDA_LAUNCH_BLOCKING", "CUDA_VISIBLE_DEVICES",
    "HIPBLASLT_ALLOW_TF32", "NVIDIA_TF32_OVERRIDE", "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
)  # fmt: skip
QUERY = (
    "name,driver_version,memory.total,pcie.link.gen.current,pcie.link.width.current,clocks.max.sm,"
    "persistence_mode,compute_mode,pci.bus_id"
)
Interval = tuple[float, float]  # start and end


# --- facts ----------------------------------------------------------------------------------------


def facts(settings: "Settings") -> dict:
    """The bus, versions, what the environment sets, and rates in GB/s."""
    result: dict[str, Any] = {
        "torch": torch.__version__, "cuda": torch.version.cuda, "cores": processors(),
        "environment": {name: os.environ[name] for name in OVERRIDES if name in os.environ},
        "sha256_a_core": sha256_rate(settings.pick(1 << 30, 1 << 22)),
        "disk": {n: disk_rates(settings, n) for n in settings.pick((1, 4, 16), (1, 2))},
    }  # fmt: skip
    if settings.on_gpu and shutil.which("nvidia-smi"):
        argv = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
        done = subprocess.run(argv, capture_output=True, text=True)
        result["gpu"] = dict(zip(QUERY.split(","), done.stdout.strip().split(", "), strict=False))
        result["numa_of_gpu"] = numa_of(result["gpu"].pop("pci.bus_id", ""))
        result["numa_of_process"] = sorted(os.sched_getaffinity(0))
    if settings.on_gpu:
        result["architectures"] = torch.cuda.get_arch_list()
        result["capability"] = torch.cuda.get_device_capability(settings.device)
        for pinned in (True, False):
            result["pinned" if pinned else "pageable"] = copy_rates(settings.device, pinned)
    return result


def processors() -> int:
    """All that this process may use."""
    return len(os.sched_getaffinity(0))


def numa_of(bus: str) -> str | None:
    """The node whose memory and cores a GPU is near."""
    path = Path("/sys/bus/pci/devices") / bus.lower().removeprefix("0000") / "numa_node"
    return path.read_text().strip() if bus and path.exists() else None


def copy_rates(device: str, pinned: bool, size: int = 1 << 28, times: int = 8) -> dict[str, float]:
    """GB/s to the GPU, back, and the sum of both at once."""
    host = [torch.empty(size, dtype=torch.uint8, pin_memory=pinned) for _ in range(2)]
    gpu = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]
    streams = [torch.cuda.Stream(device) for _ in range(2)]

    def copy(which: Iterable[int]) -> float:
        torch.cuda.synchronize(device)
        began = time.perf_counter()
        for _ in range(times):
            for way in which:
                to, source = (gpu, host) if way == 0 else (host, gpu)
                with torch.cuda.stream(streams[way]):
                    to[way].copy_(source[way], non_blocking=True)
        torch.cuda.synchronize(device)
        return times * size * len(list(which)) / (time.perf_counter() - began) / common.GB

    ways = {"to_gpu": [0], "to_host": [1], "both": [0, 1]}
    for which in ways.values():
        copy(which)  # pages are touched once
    return {name: round(copy(which), 2) for name, which in ways.items()}


def sha256_rate(size: int) -> float:
    data, began = bytes(size), time.perf_counter()
    hashlib.sha256(data).digest()
    return round(size / (time.perf_counter() - began) / common.GB, 2)


def disk_rates(settings: "Settings", threads: int) -> dict[str, float]:
    """GB/s of so many threads, each with a file of its own: written, then read."""
    size, block = settings.pick(1 << 30, 1 << 22) // threads, bytes(4 << 20)
    paths = [settings.work / f"disk-{number}" for number in range(threads)]

    def write(path: Path) -> None:
        with path.open("wb", buffering=0) as file:
            for _ in range(max(1, size // len(block))):
                file.write(block)
            os.fsync(file.fileno())

    def read(path: Path) -> None:
        room = bytearray(len(block))
        with path.open("rb", buffering=0) as file:
            while file.readinto(room):
                pass

    rates = {}
    for name, work in (("written", write), ("read", read)):
        began = time.perf_counter()
        running = [threading.Thread(target=work, args=(path,)) for path in paths]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
        total = sum(path.stat().st_size for path in paths)
        rates[name] = round(total / (time.perf_counter() - began) / common.GB, 2)
    for path in paths:
        path.unlink()
    return rates


# --- merges ---------------------------------------------------------------------------------------


def speed(settings: "Settings") -> dict:
    """GB/s of whole merges, imports paid; on one of them, what overlaps on the GPU."""
    counts = [n for n in (1, 2, 4, 8, 16, 32) if n <= max(processors(), 2)]
    cases: list[dict[str, Any]] = [
        *({"shards": n, "hash": hash} for n in (16, 4) for hash in ("none", "sha256")),
        *({"workers": n} for n in counts),
        *({"rank": n} for n in (256, 800)),
        {"device": "cpu"},
        {"rank": 800, "device": "cpu"},
    ]
    time_merge(settings, size=min(settings.size, 0.5))  # starts what is started once
    return {
        "size_gb": settings.size,
        "merges": {
            name_of(case): attempt(lambda case=case: time_merge(settings, **case))
            for case in settings.pick(cases, cases[:2])
        },
        "overlap": attempt(lambda: overlap_of_merge(settings)),
        "host_memory": host_memory(settings),
    }


def name_of(case: dict[str, Any]) -> str:
    shards, hash = case.get("shards", 16), case.get("hash", "none")
    more = [f"{key} {case[key]}" for key in ("workers", "rank", "device") if key in case]
    return ", ".join([f"{shards} shards", hash, *more])


def time_merge(settings: "Settings", shards: int = 16, hash: str = "none",
               workers: int | None = None, rank: int = 16, device: str | None = None,
               size: float | None = None) -> dict:  # fmt: skip
    where = device or settings.device
    base, adapter = checkpoint(settings, size or settings.size, rank, shards)
    plan, out = planned(settings, base, adapter, where)
    if where != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(where)
    began = time.perf_counter()
    run(plan, Stage(FolderOutput(out)), local.local(where, workers), hash=hash)
    seconds = time.perf_counter() - began
    shutil.rmtree(out)
    rate = common.folder_bytes(base) / seconds / common.GB
    result = {"seconds": round(seconds, 3), "gb_per_second": round(rate, 2)}
    if where != "cpu":
        wanted, reserved = plan.totals()["device_memory"], torch.cuda.max_memory_reserved(where)
        result |= {
            "allocated": torch.cuda.max_memory_allocated(where), "planned": wanted,
            "reserved": reserved, "reserved_of_planned": round(reserved / wanted, 2),
        }  # fmt: skip
    return result


def host_memory(settings: "Settings") -> dict[str, int]:
    """Page-locked memory, as torch counts it."""
    counted = getattr(torch.cuda, "host_memory_stats", None)  # since torch 2.8
    if not settings.on_gpu or counted is None:
        return {}
    wanted = ("allocated_bytes.current", "allocated_bytes.peak", "num_host_alloc")
    return {name: counted().get(name, 0) for name in wanted}


def planned(settings: "Settings", base: Path, adapter: Path, device: str) -> tuple[Any, Path]:
    out = settings.work / "out"
    shutil.rmtree(out, ignore_errors=True)
    return adapterkit.merge(base, [adapter], out=out, dry_run=True, device=device), out


def overlap_of_merge(settings: "Settings") -> dict[str, float]:
    """Shares of a merge's time on the GPU: see `overlaps`."""
    if not settings.on_gpu:
        return overlaps({"kernel": [], "to_gpu": [], "to_host": []})
    from torch._C._autograd import DeviceType  # of the profiler's events
    from torch.profiler import ProfilerActivity, profile

    base, adapter = checkpoint(settings, min(settings.size, 4.0), 16, 16)
    plan, out = planned(settings, base, adapter, settings.device)
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        run(plan, Stage(FolderOutput(out)), local.local(settings.device), hash="none")
    shutil.rmtree(out)
    intervals: dict[str, list[Interval]] = {"kernel": [], "to_gpu": [], "to_host": []}
    for event in seen.profiler.kineto_results.events():  # type: ignore[union-attr] # after a run
        name = event.name()
        kind = "to_gpu" if "HtoD" in name else "to_host" if "DtoH" in name else "kernel"
        if event.device_type() == DeviceType.CUDA:
            intervals[kind].append((event.start_ns(), event.start_ns() + event.duration_ns()))
    return overlaps(intervals)


def overlaps(intervals: dict[str, list[Interval]]) -> dict[str, float]:
    """Shares of the time between the first and the last event with any activity (`busy`), and of
    the busy time with two kernels or copies at once (`two`) or copies both ways (`both_ways`)."""
    edges = sorted(
        (at, change, kind)
        for kind, some in intervals.items()
        for start, end in some
        for at, change in ((start, 1), (end, -1))
    )
    running = dict.fromkeys(intervals, 0)
    spent = {"busy": 0.0, "two": 0.0, "both_ways": 0.0}
    before = edges[0][0] if edges else 0.0
    for at, change, kind in edges:
        kinds = {name for name, count in running.items() if count}
        spent["busy"] += (at - before) * bool(kinds)
        spent["two"] += (at - before) * (len(kinds) > 1)
        spent["both_ways"] += (at - before) * ({"to_gpu", "to_host"} <= kinds)
        running[kind] += change
        before = at
    whole = edges[-1][0] - edges[0][0] if edges else 0.0
    busy = spent["busy"]
    return {
        "busy": round(busy / whole, 3) if whole else 0.0,
        **{name: round(spent[name] / busy, 3) if busy else 0.0 for name in ("two", "both_ways")},
    }


# --- decompositions -------------------------------------------------------------------------------


def decompositions(settings: "Settings") -> dict:
    """Seconds here and there, their ratio, and how far the results are apart."""
    shapes = settings.pick([(8192, 8192), (16384, 53248)], [(256, 320)])
    result = {}
    for n, m in shapes:
        w = decaying(n, m)
        for name, kernel in KERNELS.items():
            if name == "svd r=64" or (n, m) == shapes[0]:
                result[f"{name} {n}x{m}"] = attempt(lambda f=kernel, w=w: compare(settings, f, w))
        del w
    base, adapter = checkpoint(settings, settings.pick(2.0, 0.02), 16)
    for name, call in verbs(settings, base, adapter).items():
        result[name] = attempt(lambda call=call: compare_verb(settings, call))
    return result


def decaying(n: int, m: int) -> Tensor:
    """A matrix whose singular values fall as 1/k over noise, as those of trained weights do."""
    generator = torch.Generator().manual_seed(0)
    rank = min(n, m, 256)
    left, right = (torch.randn(size, rank, generator=generator) for size in (n, m))
    scales = torch.arange(1, rank + 1).pow(-0.5)
    noise = torch.randn(n, m, generator=generator) * 0.01
    return noise.add_((left * scales) @ (right * scales).T)


KERNELS: dict[str, Callable[[Tensor], Tensor]] = {
    "svd r=64": lambda w: truncated_svd(w, min(64, *w.shape)).s,
    "qr": lambda w: torch.linalg.qr(w).R.diagonal().abs(),
}


def compare(settings: "Settings", kernel: Callable[[Tensor], Tensor], w: Tensor) -> dict:
    results, seconds = [], []
    for device in ("cpu", settings.device):
        x = w.to(device)
        with devices.exact_arithmetic(x.device), torch.inference_mode():
            timed: list[float] = []
            for _ in range(1 if device == "cpu" and not settings.small else 2):
                began = time.perf_counter()
                results.append(kernel(x).cpu())  # waits for a card
                timed.append(time.perf_counter() - began)
        seconds.append(timed[-1])  # the first one on a GPU starts its libraries
    apart = float((results[0] - results[-1]).abs().max() / results[0].abs().max())
    return ratio(seconds) | {"apart": apart}


def ratio(seconds: list[float]) -> dict:
    return {"cpu": round(seconds[0], 4), "device": round(seconds[1], 4),
            "times": round(seconds[0] / seconds[1], 2)}  # fmt: skip


Verb = Callable[[str, Path], Any]  # (device, out)


def verbs(settings: "Settings", base: Path, adapter: Path) -> dict[str, Verb]:
    """Whole jobs: read, compute, write."""
    config = common.config_for(settings.pick(2.0, 0.02))
    many = [
        common.make_adapter(settings.work / f"many-{n}", config, "bfloat16", 16, seed=n)
        for n in range(settings.pick(8, 4))
    ]
    tuned = settings.work / "tuned"
    if not tuned.exists():
        adapterkit.merge(base, [adapter], out=tuned, device="cpu")

    def combine(method: str) -> Verb:
        return lambda device, out: adapterkit.combine(
            many, out=out, device=device, method=method, density=0.5, rank=16
        )

    def quantize(to: str) -> Verb:
        return lambda device, out: adapterkit.quantize(base, out=out, device=device, to=to)

    rank = settings.pick(64, 4)
    found: dict[str, Verb] = {
        "extract": lambda device, out: adapterkit.extract(
            base, tuned, out=out, device=device, rank=rank
        ),
        "init pissa": lambda device, out: adapterkit.init(
            base, out=out, device=device, method="pissa", rank=rank, targets="all-linear"
        ),
        "loftq": lambda device, out: adapterkit.loftq(base, out=out, device=device, rank=rank),
        "combine ties": combine("ties"),
        "combine dare_ties": combine("dare_ties"),
    }
    formats = settings.pick(("nf4", "fp4", "int8", "fp8", "mxfp4", "w4a16", "w8a16"), ("nf4",))
    found |= {f"quantize {name}": quantize(name) for name in formats}
    packed = settings.work / "packed"
    if not packed.exists():
        adapterkit.quantize(base, out=packed, to="nf4", device="cpu")
    found["dequantize nf4"] = lambda device, out: adapterkit.dequantize(
        packed, out=out, device=device
    )
    return found


def compare_verb(settings: "Settings", call: Verb) -> dict:
    seconds, results = [], []
    for device in ("cpu", settings.device):
        out = settings.work / f"verb-{len(seconds)}"
        shutil.rmtree(out, ignore_errors=True)
        began = time.perf_counter()
        call(device, out)
        seconds.append(time.perf_counter() - began)
        results.append(tensors_of(out))
        shutil.rmtree(out)
    here, there = results
    off = sum(int((here[key] != there[key]).sum()) for key in here)
    return ratio(seconds) | {"unlike": off / max(sum(t.numel() for t in here.values()), 1)}


# --- the runtime ----------------------------------------------------------------------------------


def runtime(settings: "Settings") -> dict:
    """Training steps and a batch of rows of many adapters: seconds and peak memory on the GPU,
    ours and PEFT's."""
    import peft

    from adapterkit import LoraConfig
    from adapterkit.runtime import attach

    methods = {"LoRA": (False, False), "DoRA": (True, False)}
    if settings.on_gpu and find_spec("bitsandbytes"):
        methods["QLoRA"] = (False, True)
    result: dict[str, Any] = {}
    for name, (dora, packed) in methods.items():
        config = LoraConfig(16, 32, "all-linear", dora=dora)
        other = peft.LoraConfig(
            r=16, lora_alpha=32, target_modules="all-linear", use_dora=dora, task_type="CAUSAL_LM"
        )
        model = lambda packed=packed: packed_llama(settings) if packed else llama(settings)
        mine = lambda config=config, model=model: attach(model(), config, seed=0).model
        theirs = lambda other=other, model=model: peft.get_peft_model(model(), other)
        result[name] = attempt(lambda mine=mine, theirs=theirs: beside_peft(settings, mine, theirs))
    rows = attempt(lambda: rows_of_adapters(settings))
    return result | {f"rows of {settings.pick(64, 4)} adapters": rows}


def beside_peft(
    settings: "Settings", mine: Callable[[], Any], theirs: Callable[[], Any]
) -> dict[str, Any]:
    sides = {"adapterkit": train(settings, mine()), "PEFT": train(settings, theirs())}
    ratios = {
        f"{key}_of_peft": round(sides["adapterkit"][key] / sides["PEFT"][key], 3)
        for key in ("seconds", "peak")
        if sides["PEFT"][key]
    }
    return sides | ratios


def rows_of_adapters(settings: "Settings") -> dict[str, float]:
    """Seconds of a batch whose rows have an adapter each."""
    import peft

    from adapterkit.runtime import load

    count = settings.pick(64, 4)
    folders = [
        common.make_adapter(settings.work / f"row-{n}", config_of(settings), "bfloat16", 16, seed=n)
        for n in range(count)
    ]
    names = [str(number) for number in range(count)]
    mine = load(llama(settings), folders[0], name="0")
    theirs = peft.PeftModel.from_pretrained(llama(settings), folders[0], adapter_name="0")
    for name, folder in list(zip(names, folders, strict=True))[1:]:
        mine.load(folder, name=name)
        theirs.load_adapter(folder, adapter_name=name)
    theirs.eval()
    ids = torch.randint(0, 1000, (count, 32), device=settings.device)

    def call() -> float:
        return median(seconds_of(settings, lambda: mine.model(input_ids=ids)) for _ in range(5))

    with torch.inference_mode():
        with mine.rows(names):
            rows = {"first": seconds_of(settings, lambda: mine.model(input_ids=ids))}
            rows["adapterkit"] = call()
        with mine.disabled():
            rows["without"] = call()
        rows["PEFT"] = median(
            seconds_of(settings, lambda: theirs(input_ids=ids, adapter_names=names))
            for _ in range(5)
        )
    return rows | {"times_without": round(rows["adapterkit"] / rows["without"], 2)}


def config_of(settings: "Settings") -> dict:
    return common.config_for(settings.pick(2.0, 0.02))


def llama(settings: "Settings") -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    with torch.device(settings.device):
        return LlamaForCausalLM(LlamaConfig(**config_of(settings))).bfloat16()


def packed_llama(settings: "Settings") -> Any:
    """The same sizes in nf4, by bitsandbytes."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    base, _ = checkpoint(settings, settings.pick(2.0, 0.02), 16)
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    return AutoModelForCausalLM.from_pretrained(
        base, quantization_config=config, device_map={"": settings.device}
    )


def train(settings: "Settings", model: Any) -> dict[str, float]:
    """The median of steps, and the peak of the GPU's memory."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ids = torch.randint(0, 1000, settings.pick((8, 512), (1, 16)), device=settings.device)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    if settings.on_gpu:
        torch.cuda.reset_peak_memory_stats(settings.device)
    seconds = median(seconds_of(settings, step) for _ in range(settings.pick(7, 2)))
    peak = torch.cuda.max_memory_allocated(settings.device) if settings.on_gpu else 0
    return {"seconds": seconds, "peak": peak}


def seconds_of(settings: "Settings", call: Callable[[], object]) -> float:
    wait = (lambda: torch.cuda.synchronize(settings.device)) if settings.on_gpu else (lambda: None)
    wait()
    began = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - began


# --- other loaders --------------------------------------------------------------------------------


def peers(settings: "Settings") -> dict:
    """GB/s at which others bring a checkpoint's tensors onto the device: a bar for our reading."""
    from safetensors.torch import load_file

    base, _ = checkpoint(settings, settings.pick(8.0, 0.02), 16)
    files = sorted(base.glob("*.safetensors"))

    def safetensors() -> None:
        for path in files:
            load_file(path, device=settings.device)

    found: dict[str, Callable[[], object]] = {
        "safetensors": safetensors, "adapterkit": lambda: read_all(settings, base)
    }  # fmt: skip
    if settings.on_gpu and find_spec("fastsafetensors"):
        found["fastsafetensors"] = lambda: fastsafetensors(settings, files)
    size = sum(path.stat().st_size for path in files)
    common.warm(base)
    return {
        name: round(size / min(seconds_of(settings, call) for _ in range(3)) / common.GB, 2)
        for name, call in found.items()
    }


def read_all(settings: "Settings", base: Path) -> None:
    """All tensors of a checkpoint onto the device, by the reader of tasks."""
    checkpoint = open_checkpoint(LocalFolder(base))
    device = devices.pick_device(settings.device)
    with Sources((checkpoint.folder,), {}) as sources, ThreadPoolExecutor(processors()) as pool:
        reader = LocalReader(sources, device, dtype=None)
        for _ in pool.map(reader.tensor, checkpoint.tensors.values()):
            pass


def fastsafetensors(settings: "Settings", files: list[Path]) -> None:
    # a package of the GPU's machine
    from fastsafetensors import SafeTensorsFileLoader, SingleGroup  # type: ignore[import-not-found]

    loader = SafeTensorsFileLoader(SingleGroup(), torch.device(settings.device), nogds=True)
    loader.add_filenames({0: [str(path) for path in files]})
    copied = loader.copy_files_to_device()
    copied.close()
    loader.close()

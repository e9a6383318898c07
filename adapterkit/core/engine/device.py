"""Devices that plans run on: names, streams, memory that runs out, and arithmetic that does not
depend on the caller's settings."""

from __future__ import annotations

import functools
import itertools
import os
import re
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from adapterkit.core.errors import Failed, Refused, shown
from adapterkit.core.lazy import Tensor, torch
from adapterkit.core.system import system

# cuBLAS repeats its bits on several streams only with workspaces of a fixed size
WORKSPACE = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
SHORTENING = {  # environment variables that make libraries multiply in lower precision
    "NVIDIA_TF32_OVERRIDE": "products in float32 would have three digits",
    "HIPBLASLT_ALLOW_TF32": "products in float32 would have three digits",
    "CUBLAS_EMULATE_SINGLE_PRECISION": "products in float32 would be sums of products of bfloat16",
    "CUBLAS_EMULATE_DOUBLE_PRECISION": "products in float64 would be sums of products of integers",
}
CUDA = re.compile("cuda(?::(0|[1-9][0-9]*))?")
# the number of this process on its node, by torchrun, Open MPI, MPICH's kind and Slurm, the
# innermost first, as in many/workers/launcher.py
LOCAL_RANKS = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID")
OUT_OF_MEMORY = {
    "cpu": "free some memory, then --resume",
    "cuda": "free some of the GPU's memory and give --resume, "
    "or begin again with --device cpu --overwrite",
}
CERTAIN = (
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUSOLVER_STATUS_ALLOC_FAILED",
    "DefaultCPUAllocator: can't allocate memory",
)
# texts of a full GPU too: libraries that find no memory to start, and torch if it cannot query
# the free memory
OFTEN = (
    "CUBLAS_STATUS_NOT_INITIALIZED",
    "CUSOLVER_STATUS_NOT_INITIALIZED",
    "CUSOLVER_STATUS_INTERNAL_ERROR",
    "cusolver error: 7",
    "NVML_SUCCESS == r INTERNAL ASSERT FAILED",
)
FULL = 1 << 30  # free bytes below which a GPU counts as full


@functools.cache
def precisions() -> list[Any]:
    """Return torch's settings that allow float32 products in lower precision."""
    backends = [torch.backends.cuda, torch.backends.mkldnn]
    settings = [getattr(backend, "matmul", None) for backend in backends]
    return [one for one in settings if hasattr(one, "fp32_precision")]


def pick_device(name: str) -> torch.device:
    """Return torch's device for `cpu`, `cuda` or `cuda:i`; the CPU for `auto`, which `place`
    decides.

    `Refused` if there is no such device, if it cannot compute, or if the environment makes the GPU
    use lower precision."""
    if name in ("auto", "cpu"):
        return torch.device("cpu")
    count = gpu_count()
    cuda = CUDA.fullmatch(name)
    if cuda is None or count <= int(cuda[1] or 0):
        without = "use cpu, or install a CUDA build of torch and the driver of your GPU"
        raise Refused(
            f"device {name!r}; torch finds {count} CUDA devices here",
            expected="auto, cpu, cuda or cuda:i",
            where="--device",
            hint=f"use cpu, or a device from cuda:0 to cuda:{count - 1}" if count else without,
            code="AK109",
        )
    device = torch.device(name)
    probe_gpu_memory(device)
    return device


def is_cpu(name: str) -> bool:
    """Return whether a device's name means the CPU for every plan."""
    return name == "cpu" or (name == "auto" and gpu_count() == 0)


def gpu_count() -> int:
    """Return the number of GPUs that torch can use, without importing torch if the system has no
    GPU driver."""
    if "torch" not in sys.modules and not system.may_have_gpus():
        return 0
    return torch.cuda.device_count()


def probe_gpu_memory(device: torch.device) -> tuple[int, int]:
    """Return the free and total bytes of a GPU after a test computation. If that fails, `Refused`
    with the driver's text: torch has no kernels for it, another process owns it, it is full, or the
    driver is too old."""
    for name, problem in SHORTENING.items():
        if os.environ.get(name, "0") not in ("", "0"):
            raise Refused(
                f"{name}={os.environ[name]}: {problem}",
                expected="numbers as they are",
                where="the environment",
                hint="unset it, or use --device cpu",
                code="AK109",
            )
    try:
        three = float(torch.ones(3, device=device).sum())
        text = f"1 + 1 + 1 = {three:g}" if three != 3 else ""
        memory = torch.cuda.mem_get_info(device)
    except (RuntimeError, torch.cuda.DeferredCudaCallError) as error:
        text, memory = str(error).partition("\n")[0], (0, 0)
    if text:
        raise Refused(
            f"{device} does not compute: {shown(text)}",
            expected="a GPU that is free, and that this torch has kernels for",
            where="--device",
            hint="use cpu, or free the GPU, or install the torch for it and its driver",
            code="AK109",
        )
    return memory


def own_gpu() -> int | None:
    """Return this process's GPU among those that the processes of a node share; None if no variable
    names it, or if there are not several."""
    count = gpu_count()
    declared = (os.environ[name] for name in LOCAL_RANKS if name in os.environ)
    text = next(declared, "")
    return int(text) % count if count > 1 and text.isdecimal() else None


def has_float64(device: torch.device) -> bool:
    return device.type != "mps"


def with_float64(device: torch.device) -> torch.device:
    """Return the device, or the host if the device has no float64."""
    return device if has_float64(device) else torch.device("cpu")


def has_room(device: torch.device, nbytes: int, left: float) -> bool:
    """Return whether `nbytes` more, in float64, leave this share of a device's memory free."""
    if device.type != "cuda":
        return has_float64(device)
    free, total = torch.cuda.mem_get_info(device)
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + kept - nbytes >= left * total


def holds(device: torch.device, nbytes: int) -> bool:
    """Return whether half of a GPU's total memory is enough for `nbytes`. Free memory does not
    count, so that bits do not depend on it."""
    return device.type != "cuda" or 2 * nbytes <= torch.cuda.mem_get_info(device)[1]


def begin_copy_to_host(tensor: Tensor) -> Tensor:
    """Begin a copy to the host's memory, page-locked if possible; it is complete when a `Mark` made
    after it is."""
    try:
        return tensor.to("cpu", non_blocking=tensor.is_cuda)
    except RuntimeError:  # there is none
        return tensor.to("cpu")


def kind(device: torch.device) -> str:
    """Return the kind of device that determines a plan's bits: `cpu`, or `cuda` with the GPU's name
    and torch's version. GPUs, and versions of cuBLAS, sum in different orders."""
    if device.type == "cpu":
        return "cpu"
    return f"{device.type} {torch.cuda.get_device_name(device)}, torch {torch.__version__}"


def arithmetic(device: torch.device, threads: int) -> str:
    """Return the setup that determines the bits of torch's own products: the `kind`, and for a CPU
    its instructions and the number of threads that share a product."""
    if device.type != "cpu":
        return kind(device)
    return f"cpu {torch.backends.cpu.get_cpu_capability()}, {threads} threads"


@contextmanager
def exact_arithmetic(device: torch.device) -> Iterator[None]:
    """Compute products of float32 in float32 and, on a GPU, sums in a fixed order, whatever the
    caller or the environment has set. The settings are those of the whole process; they are
    restored after."""
    with float32_products(), _repeatable_sums() if device.type == "cuda" else nullcontext():
        yield


@contextmanager
def float32_products() -> Iterator[None]:
    """Compute products of float32 in float32, whatever the caller or the environment has set. The
    setting is the whole process's and is restored after; do not use it in a compiled forward."""
    settings = [(part, part.fp32_precision) for part in precisions()]
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # the newer settings hide the older one
        before = "highest"
    torch.set_float32_matmul_precision("highest")  # the newer too: both can be read
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        for part, precision in settings:
            part.fp32_precision = precision


@contextmanager
def _repeatable_sums() -> Iterator[None]:
    os.environ.setdefault(*WORKSPACE)  # read when cuBLAS starts, so it stays
    mode = torch.get_deterministic_debug_mode()
    filling = torch.utils.deterministic  # `empty` would fill what it allocates
    filled = filling.fill_uninitialized_memory  # type: ignore[attr-defined] (set by its class)
    with warnings.catch_warnings():
        # functions without such an algorithm are used only where order does not matter
        warnings.filterwarnings("ignore", message=".*deterministic")
        torch.use_deterministic_algorithms(True, warn_only=True)
        filling.fill_uninitialized_memory = False  # type: ignore[attr-defined] (likewise)
        try:
            yield
        finally:
            filling.fill_uninitialized_memory = filled  # type: ignore[attr-defined] (likewise)
            torch.set_deterministic_debug_mode(mode)


@contextmanager
def memory_errors(device: torch.device) -> Iterator[None]:
    """Raise `Failed`, with one message for all libraries, if memory runs out in the block."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error, device):
            raise
        raise Failed(
            f"out of memory: {shown(error)}", hint=OUT_OF_MEMORY[device.type], code="AK605"
        ) from error


def _is_out_of_memory(error: MemoryError | RuntimeError, device: torch.device) -> bool:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error)
    if any(known in text for known in CERTAIN):
        return True
    if device.type != "cuda" or not any(known in text for known in OFTEN):
        return False
    try:
        return torch.cuda.mem_get_info(device)[0] < FULL
    except RuntimeError:  # after a sticky error every call raises it
        return False


class Streams:
    """A GPU stream for each thread, so that copies and arithmetic of different threads overlap;
    nothing on the CPU.

    The work of a thread's stream is only done once the thread has waited for it. Tensors go to
    other threads after a copy to the host, or with a `Mark` on which those wait."""

    def __init__(self, device: torch.device):
        self.device, self.own = device, threading.local()
        self.numbers = itertools.count()

    @contextmanager
    def use(self) -> Iterator[None]:
        if self.device.type == "cpu":
            yield
            return
        if not hasattr(self.own, "stream"):
            index = self.device.index
            card = torch.cuda.current_device() if index is None else index
            self.own.stream = _stream(card, next(self.numbers))
        with torch.cuda.stream(self.own.stream):
            yield


@functools.cache
def _stream(card: int, number: int) -> torch.cuda.Stream:
    """Return the stream of a job's first thread, its second, ... All jobs of a process share them,
    because memory freed in one stream serves no other, and each stream has memory of cuBLAS."""
    return torch.cuda.Stream(card)


class Mark:
    """A point in this thread's stream; nothing on the CPU, or if copies block."""

    def __init__(self, device: torch.device):
        self.event = None
        if device.type == "cuda":
            # blocking: a thread that waits leaves its core to those that read and hash
            self.event = torch.cuda.Event(blocking=True)
            self.event.record(torch.cuda.current_stream(device))

    def wait(self) -> None:
        """Block this thread until the stream has passed the mark."""
        if self.event is not None and not self.event.query():
            self.event.synchronize()

    def precede(self) -> None:
        """Make later work of this thread's stream wait for the mark."""
        if self.event is not None:
            self.event.wait()


def used_here(tensor: Tensor) -> Tensor:
    """Return a tensor of another stream that this thread's stream uses: its memory is reused only
    after that use."""
    if tensor.is_cuda:
        tensor.record_stream(torch.cuda.current_stream(tensor.device))
    return tensor

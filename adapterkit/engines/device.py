"""The devices that plans run on: their names, their streams, and arithmetic that no setting of the
caller's changes."""

import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from adapterkit.errors import Refused

# cuBLAS repeats its bits on several streams only with workspaces of a fixed size
WORKSPACE = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
PRECISIONS = [  # settings of torch by which products of float32 are made of shorter numbers
    part.matmul
    for part in (torch.backends.cuda, torch.backends.mkldnn)
    if hasattr(getattr(part, "matmul", None), "fp32_precision")
]


def pick_device(name: str) -> torch.device:
    """torch's device for `cpu`, `cuda` or `cuda:i`; of `auto` the CPU: `chosen` looks at a plan.

    `Refused` where there is no such device, or where the environment has the GPU round factors
    to TF32.
    """
    if name in ("auto", "cpu"):
        return torch.device("cpu")
    count = torch.cuda.device_count()
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type != "cuda" or count <= (device.index or 0):
        raise Refused(
            f"device {name!r}; {count} CUDA devices here",
            expected="auto, cpu, cuda or cuda:i",
            where="--device",
            hint="use cpu",
        )
    if os.environ.get("NVIDIA_TF32_OVERRIDE") == "1":
        raise Refused(
            "NVIDIA_TF32_OVERRIDE=1: products in float32 would have three digits",
            expected="float32 as it is",
            where="the environment",
            hint="unset it, or use --device cpu",
        )
    return device


def kind(device: torch.device) -> str:
    """What the same plan's bits depend on: `cpu`, or `cuda` with the GPU's name and torch's
    version. GPUs, and versions of cuBLAS, sum in different orders."""
    if device.type == "cpu":
        return "cpu"
    return f"{device.type} {torch.cuda.get_device_name(device)}, torch {torch.__version__}"


def arithmetic(device: torch.device, threads: int) -> str:
    """What the bits of torch's own products depend on: the `kind`, and of a CPU its instructions
    and how many threads share a product."""
    if device.type != "cpu":
        return kind(device)
    return f"cpu {torch.backends.cpu.get_cpu_capability()}, {threads} threads"


@contextmanager
def exact_arithmetic(device: torch.device) -> Iterator[None]:
    """Products of float32 in float32 and, on a GPU, sums in the same order every time, whatever
    the caller or the environment has set; theirs again after. Settings of the whole process."""
    with _float32_products(), _repeatable_sums() if device.type == "cuda" else nullcontext():
        yield


@contextmanager
def _float32_products() -> Iterator[None]:
    if not PRECISIONS:  # before torch 2.9
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
        return
    settings = [(part, part.fp32_precision) for part in PRECISIONS]
    try:
        for part, _ in settings:
            part.fp32_precision = "ieee"
        yield
    finally:
        for part, precision in settings:
            part.fp32_precision = precision


@contextmanager
def _repeatable_sums() -> Iterator[None]:
    os.environ.setdefault(*WORKSPACE)  # read when cuBLAS starts, so it stays
    mode = torch.get_deterministic_debug_mode()
    filling = torch.utils.deterministic  # `empty` would fill what it allocates
    filled = filling.fill_uninitialized_memory  # type: ignore[attr-defined] (set by its class)
    with warnings.catch_warnings():
        # what has no such algorithm is used for values that do not depend on an order
        warnings.filterwarnings("ignore", message=".*deterministic")
        torch.use_deterministic_algorithms(True, warn_only=True)
        filling.fill_uninitialized_memory = False  # type: ignore[attr-defined] (likewise)
        try:
            yield
        finally:
            filling.fill_uninitialized_memory = filled  # type: ignore[attr-defined] (likewise)
            torch.set_deterministic_debug_mode(mode)


class Streams:
    """A stream of the GPU for each thread, so that copies and arithmetic of different threads
    overlap; nothing on the CPU.

    What a thread's stream has been given is only done when the thread has waited for it: tensors
    go to other threads after a copy to the host, or with a `Mark` that these wait for.
    """

    def __init__(self, device: torch.device):
        self.device, self.own = device, threading.local()

    @contextmanager
    def use(self) -> Iterator[None]:
        if self.device.type == "cpu":
            yield
            return
        if not hasattr(self.own, "stream"):
            self.own.stream = torch.cuda.Stream(self.device)
        with torch.cuda.stream(self.own.stream):
            yield


class Mark:
    """A place in this thread's stream; nothing on the CPU."""

    def __init__(self, device: torch.device):
        self.event = None
        if device.type != "cpu":
            # blocking: a thread that waits leaves its core to those that read and hash
            self.event = torch.cuda.Event(blocking=True)
            self.event.record(torch.cuda.current_stream(device))

    def wait(self) -> None:
        """This thread waits until the stream has passed it."""
        if self.event is not None:
            self.event.synchronize()

    def precede(self) -> None:
        """What this thread's stream is given from now on waits until it is passed."""
        if self.event is not None:
            self.event.wait()


def used_here(tensor: Tensor) -> Tensor:
    """A tensor of another stream, which this thread's stream uses: its memory goes to others after
    that use only."""
    if tensor.is_cuda:
        tensor.record_stream(torch.cuda.current_stream(tensor.device))
    return tensor

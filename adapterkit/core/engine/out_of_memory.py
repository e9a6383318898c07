"""Memory that runs out, of the machine or of a GPU, in one message whatever library noticed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from adapterkit.core.errors import Failed, shown
from adapterkit.core.lazy import torch

HINTS = {
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
# what a full GPU says too: libraries that find no memory to begin, and torch where it cannot ask
# how much is free
OFTEN = (
    "CUBLAS_STATUS_NOT_INITIALIZED",
    "CUSOLVER_STATUS_NOT_INITIALIZED",
    "CUSOLVER_STATUS_INTERNAL_ERROR",
    "cusolver error: 7",
    "NVML_SUCCESS == r INTERNAL ASSERT FAILED",
)
FULL = 1 << 30  # bytes free on a GPU, below which it is taken to be full


@contextmanager
def memory_errors(device: torch.device) -> Iterator[None]:
    """`Failed` with a hint where memory runs out within the block."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error, device):
            raise
        raise Failed(
            f"out of memory: {shown(error)}", hint=HINTS[device.type], code="AK605"
        ) from error


def _is_out_of_memory(error: MemoryError | RuntimeError, device: torch.device) -> bool:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error)
    if any(known in text for known in CERTAIN):
        return True
    return any(known in text for known in OFTEN) and _is_full(device)


def _is_full(device: torch.device) -> bool:
    try:
        return device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < FULL
    except RuntimeError:  # after an error that stays, it is what every call raises
        return False

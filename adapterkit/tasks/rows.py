"""Rows of a step: the dtype of their arithmetic, their rounding, the chunks in which they are
computed."""

import torch
from torch import Tensor

from adapterkit import dtypes
from adapterkit.kernels.quant.stochastic import round_to
from adapterkit.plan import Loaded, Step

# of one chunk: near a core's cache, and large enough that threads seldom meet at the interpreter
# lock
ELEMENTS = 1 << 18
# enough for a copy over the bus to be worth its start; several are under way at a time
CUDA_ELEMENTS = 1 << 22


def rounded(w: Tensor, step: Step, position: int = 0) -> Tensor:
    """Values of a step as they are written; `position`: of the first of them in the tensor."""
    dtype = dtypes.torch_dtype(step.dtype)
    return w.to(dtype) if step.draws is None else round_to(w, dtype, step.draws.at(position))


def unrounded(w: Tensor, before: Tensor, edits: list[Loaded], first: int) -> Tensor:
    """The rows after the edits without roundings between these (of `--compat peft`); w where there
    are none."""
    if all(edit.exact is None for edit in edits):
        return w
    w = before.clone()
    for edit in edits:
        (edit.exact or edit.apply)(w, first)
    return w


def arithmetic(step: Step) -> torch.dtype:
    """The dtype that a step is computed in: float32; float64 where the source is, or `wide`."""
    return torch.promote_types(
        dtypes.torch_dtype(step.source.dtype), torch.float64 if step.wide else torch.float32
    )


def chunk_height(columns: int, device: str = "cpu") -> int:
    """Rows of a chunk: a function of the shape and the kind of device alone."""
    return max(1, (ELEMENTS if device == "cpu" else CUDA_ELEMENTS) // max(columns, 1))


def chunks(grid: tuple[int, int], device: torch.device) -> list[tuple[int, int]]:
    """Rows [first, last) of each chunk of a grid."""
    rows, columns = grid
    step = chunk_height(columns, device.type)
    return [(first, min(first + step, rows)) for first in range(0, rows, step)]


def byte_view(tensor: Tensor) -> memoryview:
    return tensor.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data

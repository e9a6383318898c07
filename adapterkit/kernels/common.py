"""What the quantization kernels share: pieces of rows, nibbles, scales of blocks."""

import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

# (float32 values (out,) of a column of a weight, its number) -> the nearest that can be stored
RoundColumn = Callable[[Tensor, int], Tensor]
PIECE = 1 << 16  # elements worked on at once, so that a few temporaries of them stay in cache


class Scaled(NamedTuple):
    """codes · scale."""

    codes: Tensor
    scale: Tensor


def pieces(rows: int, columns: int) -> Iterator[slice]:
    """Slices of rows with about PIECE elements."""
    step = max(1, PIECE // max(1, columns))
    return (slice(first, min(first + step, rows)) for first in range(0, rows, step))


def matrices(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The matrices in the last two axes of each, side by side."""
    return zip(*(t.reshape(-1, *t.shape[-2:]) for t in tensors), strict=True)


def block_amax(
    w: Tensor,  # (..., out, in)
    block: tuple[int, int],
) -> Tensor:  # (..., ceil(out/h), ceil(in/w))
    """The largest magnitude of each block; NaN where it holds one."""
    (height, width), (out, columns) = block, w.shape[-2:]
    amax = w.new_empty(*w.shape[:-2], math.ceil(out / height), math.ceil(columns / width))
    for x, target in matrices(w.contiguous(), amax):
        for up in pieces(len(target), height * columns):
            rows = x[up.start * height : up.stop * height]
            rows = pad(rows, (0, -columns % width, 0, -len(rows) % height))
            rows = rows.view(-1, height, rows.shape[1])
            if height > 1:
                high = torch.maximum(rows.amax(1), rows.amin(1).neg_())
            else:
                high = rows.abs().squeeze(1)
            target[up] = high.abs_().view(len(high), -1, width).amax(2)
    return amax


def scale_as_float(scale: Tensor) -> Tensor:
    """float32 of any float dtype; uint8 holds exponents (E8M0)."""
    return (scale.view(torch.float8_e8m0fnu) if scale.dtype == torch.uint8 else scale).float()


def check_finite(amax: Tensor) -> None:
    """Raises ValueError for NaN and infinities."""
    if not bool(amax.isfinite().all()):
        raise ValueError("the matrix holds values that are not finite")


# Nibbles. A table of float16 pairs is read as fast for each byte as one of single values.


@functools.cache
def nibble_pairs(values: tuple[float, ...], device: torch.device) -> Tensor:  # (256,) int32
    """For each byte the values of its low and its high nibble: two float16 in one int32."""
    half = torch.tensor(values, dtype=torch.float16)
    pairs = torch.stack([half.repeat(16), half.repeat_interleave(16)], 1)
    return pairs.view(torch.int32).flatten().to(device)


def expand_nibbles(
    packed: Tensor,  # (n, m) uint8
    table: Tensor,  # of nibble_pairs
    out: Tensor,  # (n, 2m) float32, overwritten
) -> None:
    """The values of nibbles, the low one first."""
    pairs = torch.index_select(table, 0, packed.flatten().int())
    out.copy_(pairs.view(torch.float16).view(out.shape))


def pack_nibbles(
    codes: Tensor,  # (n, 2m), 0 to 15
) -> Tensor:  # (n, m) uint8
    """Two codes in a byte, the first in the low nibble."""
    codes = codes.to(torch.uint8, memory_format=torch.contiguous_format)
    pairs = codes.view(torch.int16)  # second << 8 | first
    return (pairs | pairs >> 4).to(torch.uint8)

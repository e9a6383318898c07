"""Two codes of four bits in a byte. A table of float16 pairs is read as fast for each byte as one
of single values."""

import functools

import torch
from torch import Tensor


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

"""nf4 and fp4 of bitsandbytes, to float32 and back; the scales of blocks may be quantized too.

Encoding gives the bytes of bitsandbytes 0.50 on a CPU, which transformers stores, for float32,
float16 and bfloat16 alike: they are converted to float32 first. Its CUDA kernels differ for a few
values, which the functions name.

A weight is one row of elements, cut into blocks of `blocksize` (the last may be shorter); two
elements are in a byte, the first in the high nibble. Each block can be encoded alone. Values that
are not finite raise ValueError.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from adapterkit.core.lazy import Tensor, torch
from adapterkit.kernels.block_sizes import padded
from adapterkit.kernels.quant.grid import NESTED, Grid, check_finite, pieces
from adapterkit.kernels.quant.stochastic import Draws

Kind = Literal["nf4", "fp4"]

BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # sizes that bitsandbytes accepts
COMPARED = 1 << 16  # elements compared with all thresholds at once: the results stay in cache
SMALLEST = 1e-38  # stands for smaller scales in a division
SCALES_NOT_FINITE = "the scales hold values that are not finite"
CELLS = 1 << 16  # parts of [-1, 1] that the quantization of scales distinguishes

TABLES: dict[Kind, tuple[float, ...]] = {  # the value of each code
    "nf4": (  # quantiles of the normal distribution
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    # a 4-bit float (sign, 2 bits of exponent, mantissa) over its largest value, 12
    "fp4": tuple(
        sign * x / 12 for sign in (1, -1) for x in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
    ),
}  # fmt: skip
ORDER: dict[Kind, tuple[int, ...]] = {  # codes by rising value; of fp4's two zeros 0 is below 8
    "nf4": tuple(range(16)),
    "fp4": (11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3),
}


class Blocks(NamedTuple):
    packed: Tensor  # (ceil(n/2), 1) uint8
    absmax: Tensor  # (blocks,) float32


class Nested(NamedTuple):
    codes: Tensor  # (blocks,) uint8
    absmax: Tensor  # (ceil(blocks/256),) float32
    offset: Tensor  # () float32


# 4 bits


@dataclass(frozen=True, kw_only=True)
class BlockGrid(Grid):
    """table[rank] · absmax, with blocks as rows; a rank counts values from the lowest."""

    kind: Kind
    width: int = 0  # elements of a row of the weight whose columns are rounded
    divides: bool = False  # by the second scale, the absmax of a division, else multiplies by it

    ends: tuple[int, int] = (0, 15)
    large = True

    def scaled(self, x: Tensor, *scales: Tensor) -> Tensor:
        return x / scales[1] if self.divides else x * scales[1]

    def nearest(self, x: Tensor) -> Tensor:
        return _ranks(x, self.kind)

    def level(self, code: Tensor) -> Tensor:
        return _rising(self.kind, code.device)[code.int()]

    def column(self, number: int, rows: int) -> list[Tensor]:
        each = self.block[1]
        if self.width % each == 0:
            return [scale.reshape(rows, -1)[:, number // each] for scale in self.scales]
        last = number + rows * self.width
        at = torch.arange(number, last, self.width, device=self.scales[0].device) // each
        return [scale[at, 0] for scale in self.scales]


@functools.cache
def quant_map(kind: Kind, device: torch.device | str = "cpu") -> Tensor:  # (16,) float32
    """The value of each code, as stored: fp4's code 8 is 0 here, but decodes to -0."""
    return (torch.tensor(TABLES[kind]) + 0.0).to(device)


def quantize_4bit(
    weight: Tensor,  # n elements, any float dtype
    kind: Kind,
    blocksize: int = 64,
) -> Blocks:
    """absmax = the largest magnitude of a block; code = the nearest to w · (1 / absmax), in a tie
    that of the lower value.

    As bitsandbytes: a shorter last block is divided by its absmax instead, which is at least 1e-38;
    whole blocks below 1e-38 are scaled by 1e38 (zeros: nf4 7, fp4 0). An odd n is padded with the
    code of 0. fp4 has code 8 for values that round to 0 from above, 0 from below.

    CUDA gives zero blocks code 0, multiplies in the last block too, by a reciprocal that may be an
    ulp off, and in fp4 has the two zeros exchanged, thresholds up to 14 ulp away and ties towards
    0.
    """
    w, absmax = weight.detach().reshape(-1), []
    packed = _empty_bytes(w)
    for first, last in _parts(w.numel(), blocksize, w.device):
        x = w[first:last].float().view(-1, min(blocksize, last - first))
        amax = x.abs().amax(1)
        short = x.shape[1] < blocksize
        absmax.append(amax.clamp_(min=SMALLEST) if short else amax)
        grid = grid_of(amax, kind, x.shape[1], divides=short)
        codes = _codes(grid.nearest(grid.scaled(x, *grid.scales)).view(-1), kind)
        _pack(codes, kind, packed[first // 2 : (last + 1) // 2])
    scales = torch.cat([*absmax, w.new_empty(0, dtype=torch.float32)])
    check_finite(scales)
    return Blocks(packed[:, None], scales)


def encode_4bit(
    weight: Tensor,  # n elements, any float dtype
    absmax: Tensor,  # (blocks,) float32, as stored or decoded; may be negative
    kind: Kind,
    blocksize: int = 64,
    draws: Draws | None = None,
) -> Tensor:  # (ceil(n/2), 1) uint8
    """The codes of quantize_4bit for these scales; with draws stochastically one of the two
    neighbors.

    fp4's -0 has code 8, so that all codes decoded with a scale of at least 1e-38 come back; with 0
    none can. Raises ValueError for a wrong number of scales.
    """
    w = weight.detach().reshape(-1)
    packed = _empty_bytes(w)
    _check_blocks(absmax, w.numel(), blocksize)
    check_finite(absmax, problem=SCALES_NOT_FINITE)
    for first, last in _parts(w.numel(), blocksize, w.device):
        x = w[first:last].float().view(-1, min(blocksize, last - first))
        scale = absmax[first // blocksize : math.ceil(last / blocksize)]
        here = None if draws is None else draws.at(first)
        grid = grid_of(scale, kind, x.shape[1], divides=x.shape[1] < blocksize)
        for rows, ranks in grid.encode(x, here):
            codes = _codes(ranks.view(-1), kind)
            if kind == "fp4":
                minus = (x[rows] == 0) & (x[rows].signbit() ^ (grid.scales[0][rows] < 0))
                codes.add_(minus.view(-1).to(torch.uint8), alpha=8)
            start = first + rows.start * x.shape[1]
            _pack(codes, kind, packed[start // 2 : (start + len(codes) + 1) // 2])
    return packed[:, None]


def grid_of(
    absmax: Tensor,  # (blocks,) float32, as stored or decoded
    kind: Kind,
    blocksize: int,
    *,
    width: int = 0,
    divides: bool = False,
) -> BlockGrid:
    """The grid of a row per block."""
    absmax, block = absmax.float()[:, None], (1, blocksize)
    # the divisor or factor of values
    by = torch.where(absmax < 0, absmax.clamp(max=-SMALLEST), absmax.clamp(min=SMALLEST))
    scales = absmax, by if divides else by.reciprocal_()
    return BlockGrid(scales=scales, block=block, kind=kind, width=width, divides=divides)


def decode_4bit(
    packed: Tensor,  # ceil(n/2) bytes, in any storage dtype and shape
    absmax: Tensor,  # (blocks,) float32
    kind: Kind,
    blocksize: int,
    size: int,  # n
) -> Tensor:  # (n,) float32
    """code · absmax.

    Rounded to the state's dtype this is bitsandbytes' dequantize_4bit, except that on CPUs with
    AVX-512 it uses wrong scales for rows that are not whole blocks (in 0.50.2, where 16 divides
    them).
    """
    _check_blocks(absmax, size, blocksize)
    stored = packed.reshape(-1).view(torch.uint8)
    if len(stored) != (size + 1) // 2:
        raise ValueError(f"expected {(size + 1) // 2} bytes for {size} elements, not {len(stored)}")
    out = torch.empty(2 * len(stored), device=packed.device)
    table = _pairs(kind, packed.device)
    for first, last in _parts(size, blocksize, packed.device):
        each = stored[first // 2 : (last + 1) // 2]
        x = out[first : last + last % 2]
        torch.index_select(table, 0, each.int(), out=x.view(torch.int64))
        scale = absmax[first // blocksize : math.ceil(last / blocksize)]
        x[: last - first].view(-1, min(blocksize, last - first)).mul_(scale.float()[:, None])
    return out[:size]


def _parts(size: int, blocksize: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """Ranges of whole blocks, in large pieces, then of the shorter last block."""
    if blocksize not in BLOCKS:
        raise ValueError(f"expected a block size of {', '.join(map(str, BLOCKS))}, not {blocksize}")
    for blocks in pieces((size // blocksize, blocksize), device, large=True):
        yield blocks.start * blocksize, blocks.stop * blocksize
    if size % blocksize:
        yield size // blocksize * blocksize, size


def _empty_bytes(w: Tensor) -> Tensor:
    return torch.empty((w.numel() + 1) // 2, dtype=torch.uint8, device=w.device)


def _ranks(
    x: Tensor,  # float32
    kind: Kind,
) -> Tensor:  # uint8; int32 on a GPU
    """The number of thresholds below each value. Comparing with each is faster than a search,
    because numpy does 16 at a time."""
    thresholds = _thresholds(kind, x.device)
    if x.device.type != "cpu":
        return torch.bucketize(x, thresholds, out_int32=True)
    values, ranks = x.reshape(-1).numpy(), np.empty(x.numel(), np.uint8)
    for first in range(0, len(values), COMPARED):
        part = slice(first, first + COMPARED)
        above = np.greater(values[part], thresholds.numpy()[:, None]).view(np.uint8)
        np.add.reduce(above, axis=0, dtype=np.uint8, out=ranks[part])
    return torch.from_numpy(ranks).view(x.shape)


def _codes(ranks: Tensor, kind: Kind) -> Tensor:  # (m,) uint8
    """The codes of values by their rank."""
    if kind == "nf4":
        return ranks.to(torch.uint8)
    if ranks.device.type != "cpu":
        return _order(kind, ranks.device)[ranks.int()]
    codes = ranks.to(torch.uint8).numpy().tobytes().translate(bytes(ORDER[kind]).ljust(256))
    return torch.frombuffer(bytearray(codes), dtype=torch.uint8)


def in_blocks(
    weight: Tensor,  # n elements, any float dtype
    blocksize: int,
) -> Tensor:  # (blocks, blocksize) float32
    """The elements, with zeros after the last."""
    w = weight.detach().reshape(-1).float()
    return padded(w, (0, -len(w) % blocksize)).view(-1, blocksize)


def _pack(
    codes: Tensor,  # (m,) uint8
    kind: Kind,
    out: Tensor,  # (ceil(m/2),) uint8, overwritten
) -> None:
    codes = padded(codes, (0, len(codes) % 2), value=7 if kind == "nf4" else 0)  # the code of 0
    pairs = codes.view(torch.int16)  # second << 8 | first
    out.copy_(pairs << 4 | pairs >> 8)


@functools.cache
def _order(kind: Kind, device: torch.device) -> Tensor:  # (16,) uint8
    """The code of each rank."""
    return torch.tensor(ORDER[kind], dtype=torch.uint8).to(device)


@functools.cache
def _rising(kind: Kind, device: torch.device | str) -> Tensor:  # (16,) float32
    """The value of each rank."""
    return quant_map(kind)[list(ORDER[kind])].to(device)


@functools.cache
def _thresholds(kind: Kind, device: torch.device) -> Tensor:  # (15,) float32, rising
    values = _rising(kind, "cpu")
    return ((values[:-1] + values[1:]) / 2).to(device)


@functools.cache
def _pairs(kind: Kind, device: torch.device) -> Tensor:  # (256,) int64
    """For each byte the values of its high and its low nibble, two float32 in one int64."""
    values = torch.tensor(TABLES[kind])
    pairs = torch.stack([values.repeat_interleave(16), values.repeat(16)], 1)
    return pairs.view(torch.int64).flatten().to(device)


def _check_blocks(absmax: Tensor, size: int, blocksize: int) -> None:
    count = math.ceil(size / blocksize)
    if absmax.shape != (count,):
        raise ValueError(f"expected {count} scales for {size} elements, not {tuple(absmax.shape)}")


# scales of 8 bits (double quantization)


def quantize_absmax(
    absmax: Tensor,  # (blocks,) float32
    offset: Tensor | float | None = None,  # None: the mean
    scale: Tensor | None = None,  # (ceil(blocks/256),) float32; None: computed
    values: Tensor | None = None,  # (256,) float32, rising; None: dynamic_map
) -> Nested:
    """Double quantization: d = absmax - mean, each 256 of them scaled by 1 / max |d| and looked up
    in a table of 65536 equal cells of [-1, 1] with the nearest value of the map; values nearer to 0
    than half a cell are not distinguished.

    The mean is torch's of float32 in one thread; in several, as in bitsandbytes, its last bit can
    differ above 32768 blocks. On CUDA it always can, and the map itself is searched.

    Not the inverse of decode_absmax: the mean of decoded scales differs, and d has lost bits. Keep
    the stored bytes, or pass offset and scale to encode a changed block's absmax among others.
    """
    absmax = absmax.float()
    check_finite(absmax, *(() if scale is None else (scale,)), problem=SCALES_NOT_FINITE)
    if offset is None:
        offset = absmax.expand(2, -1).mean(1)[0]  # two rows: one thread sums each
    offset = _number(offset, absmax.device)
    d = absmax - offset
    groups = padded(d, (0, -len(d) % NESTED)).view(-1, NESTED)
    scale = groups.abs().amax(1) if scale is None else scale
    scaled = (groups * scale.reciprocal()[:, None]).clamp_(-1, 1)
    scaled.nan_to_num_(-1.0)  # 0 · inf is NaN and gets the first code
    index = ((scaled + 1) * 0.5 * (CELLS - 1) + 0.5).long()
    cells = _cells(None if values is None else tuple(values.tolist()), absmax.device)
    return Nested(cells[index].view(-1)[: len(d)], scale, offset)


def decode_absmax(
    codes: Tensor,  # (blocks,) uint8
    absmax: Tensor,  # (ceil(blocks/blocksize),) float32: nested_absmax
    values: Tensor,  # (256,) float32: nested_quant_map
    offset: Tensor | float,
    blocksize: int = NESTED,
    dtype: torch.dtype | None = None,  # nested_dtype; None: float32
) -> Tensor:  # (blocks,) float32
    """values[code] · absmax + offset, each of the two rounded to `dtype`; may be 0 or less."""
    group = torch.arange(len(codes), device=codes.device) // blocksize
    product = (values.float()[codes.int()] * absmax.float()[group]).to(dtype or torch.float32)
    return (product + _number(offset, codes.device)).float()


def _number(value: Tensor | float, device: torch.device) -> Tensor:  # () float32
    """A number on the device, without a blocking copy."""
    if isinstance(value, Tensor):
        return value.to(device, torch.float32)
    return torch.full((), value, dtype=torch.float32, device=device)


@functools.cache
def dynamic_map(device: torch.device | str = "cpu") -> Tensor:  # (256,) float32, rising
    """0, 1, and for each power of ten 10^(i-6), i = 0 to 6, the middles ± of 2^i equal parts of
    [0.1, 1] times it.

    Reference: Dettmers 2015, arXiv:1511.04561. The values from -0.9930 to 1 are not symmetric.
    Older CPU versions of bitsandbytes changed the first to -1 when they quantized.
    """
    values = [torch.tensor([0.0, 1.0])]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1)
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (i - 6)
        values += [middles, -middles]
    return torch.cat(values).sort().values.to(device)


@functools.cache
def _cells(values: tuple[float, ...] | None, device: torch.device) -> Tensor:  # (65536,) uint8
    """The code of each cell: how many middles between two values of the map are below it."""
    table = dynamic_map() if values is None else torch.tensor(values)
    middles = (table[:-1] + table[1:]) * 0.5
    cells = -1 + 2 * torch.arange(CELLS).float() / (CELLS - 1)
    return torch.bucketize(cells, middles).to(torch.uint8).to(device)

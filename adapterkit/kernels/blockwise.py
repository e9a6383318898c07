"""bitsandbytes' formats: blocks of nf4 and fp4, their scales quantized once more, and rows of int8, to float32 and back.

Encoding gives the bytes of bitsandbytes 0.50 on a CPU, which transformers stores, for float32, float16 and bfloat16 alike: they are
made float32 first. Its CUDA kernels give others for a few values; the functions say for which.

A weight is one row of elements, cut into blocks of `blocksize` (the last may be shorter); two elements are in a byte, the first in
the high nibble. Each block can be worked on alone. Values that are not finite raise ValueError.
"""

import functools
import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from adapterkit.kernels.stochastic import Between, Draws, between
from adapterkit.kernels.sums import all_finite

Kind = Literal["nf4", "fp4"]

BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # sizes that bitsandbytes accepts
NESTED = 256  # scales with one scale
PIECE = (
    1 << 19
)  # elements worked on at once: fewer, and threads wait for Python's lock more than they work
COMPARED = (
    1 << 16
)  # elements compared with all thresholds at once, so that the answers stay in cache
SMALLEST = 1e-38  # stands for smaller scales in a division
CELLS = 1 << 16  # parts of [-1, 1] that the quantizing of scales tells apart

# quantiles of the normal distribution, and of sign, exponent (2 bits) and mantissa those of a 4-bit float over its largest, 12
NF4 = (
    *(
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
    ),
    *(
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
    ),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
FP4 = tuple(sign * x / 12 for sign in (1, -1) for x in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0))
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


class Rows(NamedTuple):
    codes: Tensor  # (out, in) int8
    scale: Tensor  # (out,) float32


# 4 bits


def quant_map(kind: Kind) -> Tensor:  # (16,) float32
    """The value of each code, as stored: fp4's 8 is 0 here, and -0 where it is decoded."""
    return torch.tensor(NF4 if kind == "nf4" else FP4) + 0.0


def quantize_4bit(
    weight: Tensor,  # n elements, any float dtype
    kind: Kind,
    blocksize: int = 64,
) -> Blocks:
    """absmax = the largest magnitude of a block; code = the nearest to w · (1 / absmax), between two the lower value's.

    As bitsandbytes does it: the last block, if it is shorter, is divided by its absmax instead, which is 1e-38 at least; whole
    blocks with less than 1e-38 are scaled by 1e38 (zeros: nf4 7, fp4 0). An odd n is filled up with the code of 0. fp4 has code 8
    for what rounds to 0 from above, 0 from below.

    CUDA gives zero blocks code 0, multiplies in the last block too, by a reciprocal that may be an ulp off, and in fp4 has the two
    zeros the other way round, thresholds up to 14 ulp away and ties towards 0.
    """
    w, absmax = weight.detach().reshape(-1), []
    packed = _room(w)
    for first, last in _parts(w.numel(), blocksize):
        x = w[first:last].float().view(-1, min(blocksize, last - first))
        largest = x.abs().amax(1)
        if not bool(largest.isfinite().all()):
            raise ValueError("the matrix holds values that are not finite")
        short = x.shape[1] < blocksize
        absmax.append(largest.clamp_(min=SMALLEST) if short else largest)
        codes = _in_order(_ranks(_scaled(x, largest, short), kind), kind)
        _pack(codes, kind, packed[first // 2 : (last + 1) // 2])
    return Blocks(
        packed[:, None], torch.cat(absmax) if absmax else w.new_empty(0, dtype=torch.float32)
    )


def codes_for(
    weight: Tensor,  # n elements, any float dtype
    absmax: Tensor,  # (blocks,) float32, as stored or decoded; may be negative
    kind: Kind,
    blocksize: int = 64,
    draws: Draws | None = None,
) -> Tensor:  # (ceil(n/2), 1) uint8
    """The codes of quantize_4bit beside scales that are given, or drawn from the two neighbours. fp4's -0 has code 8, so that all
    codes come back that were decoded beside a scale of 1e-38 or more; beside 0 none can."""
    w = weight.detach().reshape(-1)
    packed = _room(w)
    _check_blocks(absmax, w.numel(), blocksize)
    _check_scales(absmax)
    for first, last in _parts(w.numel(), blocksize):
        x = w[first:last].float().view(-1, min(blocksize, last - first))
        scale = absmax[first // blocksize : math.ceil(last / blocksize)].float()
        scaled = _scaled(x, scale, x.shape[1] < blocksize)
        if not math.isfinite(float(scaled.sum())) and not all_finite(x):
            raise ValueError("the matrix holds values that are not finite")
        ranks = _ranks(scaled, kind)
        if draws is not None:
            ranks = _between(x, ranks, scale, kind).drawn(draws.at(first)).to(torch.uint8).view(-1)
        codes = _in_order(ranks, kind)
        if kind == "fp4":
            codes.add_(((x == 0) & scaled.signbit()).view(-1).to(torch.uint8), alpha=8)
        _pack(codes, kind, packed[first // 2 : (last + 1) // 2])
    return packed[:, None]


def decode_4bit(
    packed: Tensor,  # ceil(n/2) bytes, in any storage dtype and shape
    absmax: Tensor,  # (blocks,) float32
    kind: Kind,
    blocksize: int,
    size: int,  # n
    first: int = 0,
    last: int | None = None,
) -> Tensor:  # (last - first,) float32
    """code · absmax of the elements first to last.

    Rounded to the state's dtype this is bitsandbytes' dequantize_4bit, except that on CPUs with AVX-512 it takes wrong scales for
    rows that are not whole blocks (in 0.50.2, where 16 divides them).
    """
    last = size if last is None else last
    _check_blocks(absmax, size, blocksize)
    text = packed.reshape(-1).view(torch.uint8)
    if len(text) != (size + 1) // 2:
        raise ValueError(f"expected {(size + 1) // 2} bytes for {size} elements, not {len(text)}")
    start, end = first // blocksize * blocksize, min(math.ceil(last / blocksize) * blocksize, size)
    out = torch.empty(2 * math.ceil((end - start) / 2), device=packed.device)
    table = _pairs(kind, packed.device)
    for at, to in _parts(end - start, blocksize):
        each = text[(start + at) // 2 : (start + to + 1) // 2]
        x = out[at : to + to % 2]
        torch.index_select(table, 0, each.int(), out=x.view(torch.int64))
        scale = absmax[(start + at) // blocksize : math.ceil((start + to) / blocksize)]
        x[: to - at].view(-1, min(blocksize, to - at)).mul_(scale.float()[:, None])
    return out[first - start : last - start]


def _parts(size: int, blocksize: int) -> Iterator[tuple[int, int]]:
    """Ranges of whole blocks with about PIECE elements, then what is left."""
    if blocksize not in BLOCKS:
        raise ValueError(f"expected a block size of {', '.join(map(str, BLOCKS))}, not {blocksize}")
    whole, step = size // blocksize * blocksize, max(1, PIECE // blocksize) * blocksize
    yield from ((first, min(first + step, whole)) for first in range(0, whole, step))
    if whole < size:
        yield whole, size


def _room(w: Tensor) -> Tensor:
    return torch.empty((w.numel() + 1) // 2, dtype=torch.uint8, device=w.device)


def _scaled(
    x: Tensor,  # (blocks, m) float32
    absmax: Tensor,  # (blocks,) float32
    short: bool,
) -> Tensor:  # (blocks, m)
    absmax = torch.where(absmax < 0, absmax.clamp(max=-SMALLEST), absmax.clamp(min=SMALLEST))[
        :, None
    ]
    return x / absmax if short else x * absmax.reciprocal()


def _ranks(
    x: Tensor,  # float32
    kind: Kind,
) -> Tensor:  # (x.numel(),) uint8
    """How many thresholds are below. Comparing with each of them is faster than to search: numpy does 16 at a time."""
    thresholds = _thresholds(kind)
    x = x.view(-1)
    if x.device.type != "cpu":
        return torch.bucketize(x, thresholds.to(x.device)).to(torch.uint8)
    values, ranks = x.numpy(), np.empty(x.numel(), np.uint8)
    for first in range(0, len(values), COMPARED):
        above = np.greater(values[first : first + COMPARED], thresholds.numpy()[:, None]).view(
            np.uint8
        )
        np.add.reduce(above, axis=0, dtype=np.uint8, out=ranks[first : first + COMPARED])
    return torch.from_numpy(ranks)


def _in_order(ranks: Tensor, kind: Kind) -> Tensor:  # (m,) uint8
    """Codes by the rank of their value."""
    if kind == "nf4":
        return ranks
    if ranks.device.type != "cpu":
        return torch.tensor(ORDER[kind], dtype=torch.uint8, device=ranks.device)[ranks.int()]
    return torch.frombuffer(
        bytearray(ranks.numpy().tobytes().translate(bytes(ORDER[kind]).ljust(256))),
        dtype=torch.uint8,
    )


def _between(
    x: Tensor,  # (blocks, m) float32
    ranks: Tensor,  # (blocks · m,) uint8
    absmax: Tensor,  # (blocks,) float32
    kind: Kind,
) -> Between:
    table, scale = quant_map(kind)[list(ORDER[kind])].to(x.device), absmax[:, None]
    return between(x, ranks.view(x.shape), lambda level: table[level] * scale, (0, 15), scale < 0)


def beyond(
    weight: Tensor,  # n elements, any float dtype
    absmax: Tensor,  # (blocks,) float32
    blocksize: int,
) -> tuple[Tensor, Tensor]:  # (blocks,) float32, (blocks,) bool
    """The largest magnitude of each block, and where that is beyond the scale's largest code."""
    largest = _padded(weight, blocksize).abs().amax(1)
    return largest, largest > absmax.abs()


def spread(
    weight: Tensor,  # n elements, any float dtype
    absmax: Tensor,  # (blocks,) float32
    kind: Kind,
    blocksize: int,
) -> Tensor:  # (blocks,) float32
    """The expected squared error of each block whose codes are drawn beside this scale."""
    w = _padded(weight, blocksize)
    parts = [
        slice(first, first + PIECE // blocksize) for first in range(0, len(w), PIECE // blocksize)
    ]
    each = [
        _between(w[p], _ranks(_scaled(w[p], absmax[p], False), kind), absmax[p], kind)
        .spread()
        .sum(1)
        for p in parts
    ]
    return torch.cat(each) if each else absmax


def _padded(weight: Tensor, blocksize: int) -> Tensor:  # (blocks, blocksize) float32
    w = weight.detach().reshape(-1).float()
    return pad(w, (0, -len(w) % blocksize)).view(-1, blocksize)


def _pack(
    codes: Tensor,  # (m,) uint8
    kind: Kind,
    out: Tensor,  # (ceil(m/2),) uint8, takes the result
) -> None:
    codes = pad(codes, (0, len(codes) % 2), value=7 if kind == "nf4" else 0)  # the code of 0
    pairs = codes.view(torch.int16)  # second << 8 | first
    out.copy_(pairs << 4 | pairs >> 8)


@functools.cache
def _thresholds(kind: Kind) -> Tensor:  # (15,) float32, rising
    values = quant_map(kind)[list(ORDER[kind])]
    return (values[:-1] + values[1:]) / 2


@functools.cache
def _pairs(kind: Kind, device: torch.device) -> Tensor:  # (256,) int64
    """For each byte the values of its high and its low nibble, two float32 in one int64."""
    values = torch.tensor(NF4 if kind == "nf4" else FP4)
    return (
        torch.stack([values.repeat_interleave(16), values.repeat(16)], 1)
        .view(torch.int64)
        .flatten()
        .to(device)
    )


def _check_blocks(absmax: Tensor, size: int, blocksize: int) -> None:
    if absmax.shape != (math.ceil(size / blocksize),):
        raise ValueError(
            f"expected {math.ceil(size / blocksize)} scales for {size} elements, not {tuple(absmax.shape)}"
        )


# scales of 8 bits


def quantize_absmax(
    absmax: Tensor,  # (blocks,) float32
    offset: Tensor | float | None = None,  # the mean if not given
    scale: Tensor | None = None,  # (ceil(blocks/256),) float32, made if not given
    values: Tensor | None = None,  # (256,) float32, rising; dynamic_map if not given
) -> Nested:
    """Double quantization: d = absmax - mean, each 256 of them scaled by 1 / max |d| and looked up in a table of 65536 equal cells
    of [-1, 1] that hold the nearest value of the map; what is nearer to 0 than half a cell is all one.

    The mean is torch's of float32 in one thread; in several, as bitsandbytes may be, its last bit can differ above 32768 blocks.
    On CUDA it does so always, and the map itself is searched.

    No inverse of decode_absmax: the mean of what is decoded is another, and d has lost bits. Keep what is stored, or give offset
    and scale to put a changed block's absmax among others.
    """
    absmax = absmax.float()
    _check_scales(absmax, scale)
    if offset is None:
        offset = absmax.expand(2, -1).mean(1)[0]  # two rows: not shared out among threads
    offset = torch.as_tensor(offset, dtype=torch.float32, device=absmax.device)
    d = absmax - offset
    groups = pad(d, (0, -len(d) % NESTED)).view(-1, NESTED)
    scale = groups.abs().amax(1) if scale is None else scale
    scaled = (
        (groups * scale.reciprocal()[:, None]).clamp_(-1, 1).nan_to_num_(-1.0)
    )  # 0 · inf is NaN and gets the first code
    index = ((scaled + 1) * 0.5 * (CELLS - 1) + 0.5).long()
    cells = _cells(tuple(values.tolist()) if values is not None else None).to(absmax.device)
    return Nested(cells[index].view(-1)[: len(d)], scale, offset)


def decode_absmax(
    codes: Tensor,  # (blocks,) uint8
    absmax: Tensor,  # (ceil(blocks/blocksize),) float32: nested_absmax
    values: Tensor,  # (256,) float32: nested_quant_map
    offset: Tensor | float,
    blocksize: int = NESTED,
    dtype: torch.dtype = torch.float32,  # nested_dtype
    first: int = 0,
    last: int | None = None,
) -> Tensor:  # (last - first,) float32
    """values[code] · absmax + offset of the scales first to last, each of the two rounded to `dtype`; may be 0 or less."""
    codes = codes[first:last]
    group = torch.arange(first, first + len(codes), device=codes.device) // blocksize
    product = (values.float()[codes.int()] * absmax.float()[group]).to(dtype)
    return (product + torch.as_tensor(offset, dtype=torch.float32, device=codes.device)).float()


def dynamic_map() -> Tensor:  # (256,) float32, rising
    """0, 1, and for each power of ten 10^(i-6), i = 0 to 6, the middles ± of 2^i equal parts of [0.1, 1] times it.

    Reference: Dettmers 2015, arXiv:1511.04561. The values from -0.9930 to 1 are not symmetric. Older CPU versions of bitsandbytes
    changed the first to -1 when they quantized.
    """
    values = [torch.tensor([0.0, 1.0])]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1)
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (i - 6)
        values += [middles, -middles]
    return torch.cat(values).sort().values


@functools.cache
def _cells(values: tuple[float, ...] | None) -> Tensor:  # (65536,) uint8
    """The code of each cell: how many middles between two values of the map are below it."""
    table = dynamic_map() if values is None else torch.tensor(values)
    middles = (table[:-1] + table[1:]) * 0.5
    return torch.bucketize(-1 + 2 * torch.arange(CELLS).float() / (CELLS - 1), middles).to(
        torch.uint8
    )


# rows of 8 bits


def quantize_int8(
    weight: Tensor,  # (out, in), any float dtype
    scale: Tensor
    | None = None,  # (out,) float32: SCB; made from the largest magnitude of each row if not given
    draws: Draws | None = None,
) -> Rows:
    """scale = max |w| of a row, code = w · (127 / scale) to nearest, ties to even; w is rounded to float16 first, as LLM.int8 does.

    Magnitudes from 65520 on are infinite in float16 and so refused; bitsandbytes stores zeros for their rows. A scale of 0 holds
    zeros. Scales and codes of decode_int8 come back where a row has a code of ±127, as all have that were made so from values
    above float16's subnormals. CUDA divides 127 by the scale less exactly: a code may be one off. With draws (and a scale) w is not
    rounded to float16 first.

    Reference: Dettmers et al. 2022, arXiv:2208.07339.
    """
    w = weight.detach()
    _check_scales(scale)
    made = torch.empty(len(w), device=w.device) if scale is None else scale.float()
    codes = torch.empty(w.shape, dtype=torch.int8, device=w.device)
    step = max(1, PIECE // max(1, w.shape[1]))
    for rows in (slice(first, first + step) for first in range(0, len(w), step)):
        x = w[rows].float() if draws is not None else w[rows].half().float()
        if scale is None:
            made[rows] = x.abs().amax(1)
        if not bool((made[rows] if scale is None else x).isfinite().all()):
            raise ValueError("the matrix holds values that are not finite in float16")
        if draws is None:
            codes[rows] = _int8_codes(x, made[rows], saturate=scale is not None)
        else:
            codes[rows] = _between_int8(x, made[rows]).drawn(draws.at(rows.start * w.shape[1]))
    return Rows(codes, made)


def renew_int8(
    weight: Tensor,  # (out, in) float32
    scale: Tensor,  # (out,) float32, as it is stored
    draws: Draws,
) -> Rows:
    """Codes drawn beside the scales that are there, so that values that do not move keep theirs. A row with a value beyond its
    largest code gets a new scale if that makes the expected square of the error smaller."""
    largest = weight.abs().amax(1)
    for row in (largest > scale.abs()).nonzero().flatten().tolist():
        x, both = weight[row].expand(2, -1), torch.stack([scale[row], largest[row]])
        old, new = _between_int8(x, both).spread().sum(1)
        if bool(new < old):
            scale = scale.index_fill(
                0, torch.tensor([row], device=scale.device), float(largest[row])
            )
    return quantize_int8(weight, scale, draws)


def _int8_codes(
    x: Tensor,  # (n, in) float32, used up
    scale: Tensor,  # (n,)
    saturate: bool,
) -> Tensor:
    factor = torch.where(scale == 0, 0.0, 127.0 / scale)
    x.mul_(factor[:, None]).round_()
    return x.clamp_(-127, 127) if saturate else x


def _between_int8(x: Tensor, scale: Tensor) -> Between:
    value = lambda level: level.float().mul_(scale[:, None]).mul_(1 / 127)
    return between(
        x, _int8_codes(x.clone(), scale, saturate=True), value, (-127, 127), (scale < 0)[:, None]
    )


def decode_int8(
    codes: Tensor,  # (out, in) int8
    scale: Tensor,  # (out,) float32: SCB
) -> Tensor:  # (out, in) float32
    """code · scale · (1/127), two roundings, as bitsandbytes' int8_vectorwise_dequant; any rows of both."""
    out = torch.empty(codes.shape, device=codes.device)
    step = max(1, PIECE // max(1, codes.shape[1]))
    for rows in (slice(first, first + step) for first in range(0, len(codes), step)):
        out[rows] = codes[rows]
        out[rows].mul_(scale[rows].float()[:, None]).mul_(1 / 127)
    return out


# shared


def _check_scales(*scales: Tensor | None) -> None:
    if not all(bool(scale.isfinite().all()) for scale in scales if scale is not None):
        raise ValueError("the scales hold values that are not finite")

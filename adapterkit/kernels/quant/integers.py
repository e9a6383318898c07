"""Weights of packed integers: compressed-tensors, torchao, and code shared with GPTQ and AWQ.

A weight is (code - zero) · scale in float32. The difference is exact, so the product is the only
rounding. The tools compute in the dtype of their scales: for fp16 or bf16, the product is exact in
float32, and rounding it to that dtype gives their result.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from adapterkit.kernels.block_sizes import padded
from adapterkit.kernels.quant.grid import WORD, Grid, check_finite, chosen, pieces
from adapterkit.kernels.quant.stochastic import Draws

# of values (out, in) whose columns are in groups of one size: scales (out, groups), and zeros int8
# unless those stay
NewScale = Callable[[Tensor], tuple[Tensor, Tensor | None]]
SIGNED_NIBBLES = (*map(float, range(8)), *map(float, range(-8, 0)))  # two's complement


class Integers(NamedTuple):
    """(codes - zero) · scale."""

    codes: Tensor  # (out, in) int8
    scale: Tensor  # (out, groups)
    zero: Tensor | None  # (out, groups) int8


@dataclass(frozen=True, kw_only=True)
class IntegerGrid(Grid):
    """(code - zero) · scale, by groups of columns; without a second scale the zero is 0."""

    index: Tensor | None = None  # (in,) the group of each column, where they are not in order

    def scaled(self, x: Tensor, *scales: Tensor) -> Tensor:
        x = super().scaled(x, *scales)
        return x.add_(scales[1]) if len(scales) > 1 else x

    def multiplied(self, level: Tensor, *scales: Tensor) -> Tensor:
        scale, *zero = scales
        return (level.sub_(zero[0]) if zero else level).mul_(scale)

    def place(self, x: Tensor, rows: slice) -> tuple[Tensor, list[Tensor]]:
        if self.index is None:
            return super().place(x, rows)
        return x, [scale[rows][:, self.index] for scale in self.scales]

    def column(self, number: int, rows: int) -> list[Tensor]:
        if self.index is not None:
            number = self._groups[number] * self.block[1]
        return super().column(number, rows)

    @cached_property
    def _groups(self) -> list[int]:
        assert self.index is not None
        return self.index.tolist()


def grid_of(
    scale: Tensor,  # (out, groups), (out, 1) or one value
    zero: Tensor | None,  # as scale
    shape: tuple[int, int],  # (out, in)
    group: Tensor | None = None,  # (in,) the group of each column; None: equal parts
    bits: int = 8,
) -> IntegerGrid:
    """The grid of groups. Raises ValueError if the columns do not divide into equal groups and
    `group` is None."""
    (out, size), one = shape, scale.numel() == 1
    scale = scale.float().reshape(1 if one else out, -1).contiguous()
    count = scale.shape[1]
    if size % count and group is None:
        raise ValueError(f"{size} columns do not divide into {count} groups")
    scales = (scale,) if zero is None else (scale, zero.float().reshape(scale.shape).contiguous())
    index = None
    if group is not None and count > 1:
        index, columns = group.to(torch.int64), torch.arange(size, device=group.device)
        if size % count == 0 and torch.equal(index, columns // (size // count)):
            index = None
    block = (out if one else 1, max(1, size // count))
    return IntegerGrid(scales=scales, block=block, ends=code_ends(bits), index=index)


def code_ends(bits: int) -> tuple[int, int]:
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


# Codes in words.


def pack(
    codes: Tensor,  # (n, m) int8, from -2^(bits-1)
    bits: int,
) -> Tensor:  # (n, ceil(m · bits / 32)) int32
    """Bits of code + 2^(bits-1), one code after another from the lowest bit, across words; 0 after
    the last.

    Older versions of compressed-tensors left bits unused if `bits` does not divide 32.
    """
    _check_bits(bits)
    n, m = codes.shape
    words = math.ceil(m * bits / WORD)
    if bits in (4, 8):
        codes = codes.to(torch.uint8, memory_format=torch.contiguous_format)
        codes = padded(codes.add_(1 << (bits - 1)), (0, words * WORD // bits - m))  # wraps
        return (pack_nibbles(codes) if bits == 4 else codes).view(torch.int32)
    codes = dense(codes).to(torch.int64).add_(1 << (bits - 1))
    shifts = torch.arange(0, 8 * bits, bits, device=codes.device)
    octets = (padded(codes, (0, -m % 8)).view(n, -1, 8) << shifts).sum(2)  # no bit twice: sum is or
    packed = octets.view(torch.uint8).view(n, -1, 8)[:, :, :bits].reshape(n, -1)
    return dense(padded(packed, (0, 4 * words - packed.shape[1]))).view(torch.int32)


def unpack(
    words: Tensor,  # (n, ceil(m · bits / 32)) int32
    bits: int,
    m: int,
) -> Tensor:  # (n, m) int8, from -2^(bits-1)
    """The inverse of `pack`."""
    return (unsigned_codes(words, bits, m) - (1 << (bits - 1))).to(torch.int8)


def unsigned_codes(words: Tensor, bits: int, m: int) -> Tensor:  # (n, m) int16
    _check_bits(bits)
    packed = dense(words).view(torch.uint8)
    if bits == 8:
        return packed[:, :m].to(torch.int16)
    packed = padded(packed, (0, -packed.shape[1] % bits)).view(len(packed), -1, bits)
    octets = padded(packed, (0, 8 - bits)).view(torch.int64)  # (n, ceil(m/8), 1)
    shifts = torch.arange(0, 8 * bits, bits, device=words.device)
    codes = (octets >> shifts).bitwise_and_((1 << bits) - 1).to(torch.int16)
    return codes.view(len(packed), -1)[:, :m]


# Two codes of four bits in a byte: a table of float16 pairs is read as fast for each byte as one of
# single values.


@functools.cache
def nibble_pairs(values: tuple[float, ...], device: torch.device) -> Tensor:  # (256,) int32
    """The values of the low and high nibble for each byte: two float16 in one int32."""
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
    """Pack two codes per byte, the first in the low nibble."""
    codes = codes.to(torch.uint8, memory_format=torch.contiguous_format)
    pairs = codes.view(torch.int16)  # second << 8 | first
    return (pairs | pairs >> 4).to(torch.uint8)


# compressed-tensors


def are_groups(index: Tensor | np.ndarray, count: int) -> bool:  # (in,)
    """Return whether all entries of an index are numbers of groups."""
    return bool(((index >= 0) & (index < count)).all())


def decode_packed(
    words: Tensor,  # (out, ceil(in · bits / 32)) int32
    scale: Tensor,  # (out, groups), (out, 1) or one value
    bits: int,
    size: int,  # in
    zero: Tensor | None = None,  # (out, groups) int8, unpacked
    group: Tensor | None = None,  # (in,) int32, the group of each column; None: equal parts
) -> Tensor:  # (out, in) float32
    """(code - zero) · scale of pack-quantized, 1 to 8 bits."""
    grid = grid_of(scale, zero, (len(words), size), group)
    out = torch.empty(len(words), size, device=words.device)
    return grid.decode(out, lambda rows, x: expand_codes(words[rows], bits, x, 1 << (bits - 1)))


def decode_int8(
    codes: Tensor,  # (out, in) int8
    scale: Tensor,  # (out, groups), (out, 1) or one value
    zero: Tensor | None = None,  # as scale, int8
    group: Tensor | None = None,  # (in,) int32, the group of each column; None: equal parts
) -> Tensor:  # (out, in) float32
    """(code - zero) · scale of int-quantized, torchao's Int8Tensor and IntxUnpackedToInt8Tensor."""
    grid = grid_of(scale, zero, (len(codes), codes.shape[1]), group)
    out = torch.empty(codes.shape, device=codes.device)
    return grid.decode(out, lambda rows, x: x.copy_(codes[rows]))


def unpack_zeros(
    words: Tensor,  # (ceil(out · bits / 32), groups) int32
    bits: int,
    out: int,
) -> Tensor:  # (out, groups) int8
    """weight_zero_point of pack-quantized, packed along `out`, unlike the weight."""
    return unpack(words.T, bits, out).T.contiguous()


def pack_zeros(
    zero: Tensor,  # (out, groups) int8
    bits: int,
) -> Tensor:  # (ceil(out · bits / 32), groups) int32
    """The inverse of `unpack_zeros`."""
    return pack(zero.T, bits).T.contiguous()


def encode_integers(
    w: Tensor,  # (out, in) float32
    bits: int,
    size: int | None = None,  # columns with one scale; None: all of a row
    scale: Tensor | None = None,  # (out, groups), (out, 1) or one value; None: computed from w
    zero: Tensor | None = None,  # as scale, int8; only with a scale
    group: Tensor | None = None,  # (in,) int32; only with a scale
    symmetric: bool = True,  # a computed scale has no zero
    scale_dtype: torch.dtype = torch.float32,
    draws: Draws | None = None,
) -> Integers:
    """code = w / scale + zero, to nearest, ties to even, within [-2^(bits-1), 2^(bits-1));
    with draws stochastically to one of the two neighbors.

    Computed scales: 2 · amax / (2^bits - 1); asymmetric, (max - min) / (2^bits - 1), the two
    widened to include 0, with zero = -2^(bits-1) - min / scale. For zeros it is the eps of
    `scale_dtype`. compressed-tensors does the same with a float32 weight; it divides a bf16 weight
    by a bf16 scale in bf16, which rounds once more.

    A scale of 0 encodes zeros, whatever w. Raises ValueError for values that are not finite.
    """
    _check_bits(bits)
    w = w.contiguous()
    if scale is None:
        width = size or w.shape[1]
        scale, zero = minmax_scale(w, bits, width, symmetric, scale_dtype)
    grid = grid_of(scale, zero, (len(w), w.shape[1]), group, bits)
    codes = torch.empty(w.shape, dtype=torch.int8, device=w.device)
    return Integers(grid.encoded(w, codes, draws), scale, zero)


def requantize_integers(
    w: Tensor,  # (out, in) float32
    bits: int,
    scale: Tensor | None,  # (out, groups); None: new ones
    zero: Tensor | None,  # (out, groups) int8
    group: Tensor | None,  # (in,) the group of each column
    new_scale: NewScale,
    draws: Draws | None = None,
) -> Integers:
    """Codes with each group's stored scale or a new one, whichever is nearer to w; with draws codes
    are sampled, and only groups with values beyond the old scale get a new one."""
    w = w.contiguous()
    if scale is None:
        scale, zero = new_scale(w)
        return encode_integers(w, bits, scale=scale, zero=zero)
    old, sampled = grid_of(scale, zero, (len(w), w.shape[1]), group, bits), draws is not None
    x = w if old.index is None else _in_groups(w, old.index, scale.shape[1])
    if x is not None:
        in_order = replace(old, index=None, block=(old.block[0], x.shape[1] // scale.shape[1]))
        beyond = in_order.overflows(x) if sampled else None
        if beyond is None or bool(beyond.any()):
            new, new_zero = new_scale(x)
            middle = zero if new_zero is None else new_zero
            better = grid_of(new, middle, (len(x), x.shape[1]), bits=bits).errors(x, sampled)
            better = better < in_order.errors(x, sampled)
            better = better if beyond is None else better & beyond
            scale = chosen(better, new, scale)
            if zero is not None and new_zero is not None:
                zero = chosen(better, new_zero, zero)
    scales = (scale,) if zero is None else (scale, zero)
    grid = replace(old, scales=tuple(one.float().contiguous() for one in scales))
    codes = torch.empty(w.shape, dtype=torch.int8, device=w.device)
    return Integers(grid.encoded(w, codes, draws), scale, zero)


def _in_groups(w: Tensor, group: Tensor, count: int) -> Tensor | None:  # (out, count · size)
    """The columns gathered by their groups, padded with 0, which every grid can represent. None if
    that takes more than twice the columns: such groups keep their scales."""
    width, sizes = w.shape[1], torch.bincount(group, minlength=count)
    size = int(sizes.max())
    if count * size > 2 * width:
        return None
    order = torch.argsort(group, stable=True)
    if width == count * size:
        return w[:, order]
    place = torch.arange(width, device=w.device)
    place += (torch.arange(count, device=w.device) * size - sizes.cumsum(0) + sizes)[group[order]]
    x = w.new_zeros(len(w), count * size)
    x[:, place] = w[:, order]
    return x


def minmax_scale(
    w: Tensor,  # (out, in) float32
    bits: int,
    size: int,  # columns with one scale
    symmetric: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:  # (out, groups), and as it int8
    """Scales, and zeros, as compressed-tensors computes them; see `encode_integers`."""
    low, high = code_ends(bits)
    groups = w.unflatten(1, (-1, size))
    lows, highs = groups.amin(2).clamp_(max=0), groups.amax(2).clamp_(min=0)
    check_finite(lows + highs)
    if symmetric:
        scale = (torch.maximum(-lows, highs) / ((high - low) / 2)).to(dtype)
        return torch.where(scale == 0, torch.finfo(dtype).eps, scale), None
    scale = ((highs - lows) / (high - low)).to(dtype)
    zero = (low - lows / scale.float()).nan_to_num_(0.0).clamp_(low, high).round_().to(torch.int8)
    return torch.where(scale == 0, torch.finfo(dtype).eps, scale), zero


# torchao


def decode_torchao_int4(
    codes: Tensor,  # (out, in/2) uint8: two's complement, the first of two in the low nibble
    scale: Tensor,  # (groups, out)
    zero: Tensor,  # (groups, out), a value, not a code
) -> Tensor:  # (out, in) float32
    """code · scale + zero of Int4Tensor (plain): two roundings."""
    grid = grid_of(scale.T, zero.T, (len(codes), 2 * codes.shape[1]))
    out = torch.empty(len(codes), 2 * codes.shape[1], device=codes.device)
    table = nibble_pairs(SIGNED_NIBBLES, codes.device)
    for part in pieces(out.shape, out.device):
        expand_nibbles(codes[part], table, out[part])
        x, (each, middle) = grid.place(out[part], part)
        x.mul_(each).add_(middle)
    return out


# Shared by the formats.


def expand_codes(
    words: Tensor,  # (n, words) int32
    bits: int,
    out: Tensor,  # (n, m) float32, overwritten
    middle: int = 0,
) -> None:
    """out = code - middle."""
    if bits != 4:
        out.copy_(unsigned_codes(words, bits, out.shape[1]).sub_(middle))
        return
    values = tuple(float(code - middle) for code in range(16))
    columns = out.shape[1]
    packed = dense(words).view(torch.uint8)[:, : (columns + 1) // 2]
    whole = out if columns % 2 == 0 else out.new_empty(len(out), 2 * packed.shape[1])
    expand_nibbles(packed, nibble_pairs(values, words.device), whole)
    if whole is not out:
        out.copy_(whole[:, :columns])


def dense(x: Tensor) -> Tensor:
    """A copy whose last axis has stride 1, which contiguous() does not ensure for single
    elements."""
    return x.clone(memory_format=torch.contiguous_format)


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"expected 1 to 8 bits, not {bits}")


def decode_hqq(
    words: Tensor,  # (ceil(rows / fields), columns) uint8 or int32
    scale: Tensor,  # (rows, 1) or (1, columns)
    zero: Tensor,  # as scale
    bits: int,
    fields: int,  # codes in a word
    rows: int,
) -> Tensor:  # (rows, columns) float32
    """(code - zero) · scale; the first rows are in the highest bits of the words."""
    parts = [words >> bits * i & (1 << bits) - 1 for i in reversed(range(fields))]
    return torch.cat(parts)[:rows].float().sub_(zero.float()).mul_(scale.float())

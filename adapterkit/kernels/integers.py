"""Weights of packed integers, to float32: compressed-tensors, torchao, GPTQ, AWQ; the first two
also from float32.

A weight is (code - zero) · scale in float32. The difference is exact, so the product is the only
rounding. The tools compute in the dtype of their scales: where that is fp16 or bf16, the product is
exact in float32, and rounding it to that dtype gives their result.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from adapterkit.kernels.common import (
    RoundColumn,
    expand_nibbles,
    nibble_pairs,
    pack_nibbles,
    pieces,
)
from adapterkit.kernels.stochastic import Draws, Neighbors, neighbors
from adapterkit.kernels.sums import all_finite

WORD = 32
REQUANTIZED = 1 << 22  # elements that are requantized at a time
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the row of eight that each nibble of a word holds
SIGNED_NIBBLES = (*map(float, range(8)), *map(float, range(-8, 0)))  # two's complement


class Integers(NamedTuple):
    """(codes - zero) · scale."""

    codes: Tensor  # (out, in) int8
    scale: Tensor  # (out, groups)
    zero: Tensor | None  # (out, groups) int8


# Codes in words.


def pack(
    codes: Tensor,  # (n, m) int8, from -2^(bits-1)
    bits: int,
) -> Tensor:  # (n, ceil(m · bits / 32)) int32
    """Bits of code + 2^(bits-1), one code after another from the lowest bit, across words; 0 after
    the last.

    Older versions of compressed-tensors left bits unused where `bits` does not divide 32.
    """
    _check_bits(bits)
    (n, m), codes = codes.shape, _dense(codes)
    words = math.ceil(m * bits / WORD)
    if bits in (4, 8):
        codes = pad((codes + (1 << (bits - 1))).to(torch.uint8), (0, words * WORD // bits - m))
        return (pack_nibbles(codes) if bits == 4 else codes).view(torch.int32)
    codes = codes.to(torch.int64).add_(1 << (bits - 1))
    shifts = torch.arange(0, 8 * bits, bits, device=codes.device)
    octets = (pad(codes, (0, -m % 8)).view(n, -1, 8) << shifts).sum(2)  # no bit twice: sum is or
    packed = octets.view(torch.uint8).view(n, -1, 8)[:, :, :bits].reshape(n, -1)
    return pad(packed, (0, 4 * words - packed.shape[1])).view(torch.int32)


def unpack(
    words: Tensor,  # (n, ceil(m · bits / 32)) int32
    bits: int,
    m: int,
) -> Tensor:  # (n, m) int8, from -2^(bits-1)
    """The inverse of `pack`."""
    return (_unsigned(words, bits, m) - (1 << (bits - 1))).to(torch.int8)


def _unsigned(words: Tensor, bits: int, m: int) -> Tensor:  # (n, m) int16
    _check_bits(bits)
    packed = _dense(words).view(torch.uint8)
    if bits == 8:
        return packed[:, :m].to(torch.int16)
    packed = pad(packed, (0, -packed.shape[1] % bits)).view(len(packed), -1, bits)
    octets = pad(packed, (0, 8 - bits)).view(torch.int64)  # (n, ceil(m/8), 1)
    shifts = torch.arange(0, 8 * bits, bits, device=words.device)
    codes = (octets >> shifts).bitwise_and_((1 << bits) - 1).to(torch.int16)
    return codes.view(len(packed), -1)[:, :m]


# compressed-tensors


def are_groups(index: Tensor, count: int) -> bool:  # (in,)
    """Whether all of an index are numbers of groups."""
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
    groups = _Groups(_by_rows(scale), None if zero is None else _by_rows(zero), size, group)
    out = torch.empty(len(words), size, device=words.device)
    for part in pieces(*out.shape):
        _expand(words[part], bits, out[part], 1 << (bits - 1))
        groups.apply(out[part], part)
    return out


def decode_int8(
    codes: Tensor,  # (out, in) int8
    scale: Tensor,  # (out, groups), (out, 1) or one value
    zero: Tensor | None = None,  # as scale, int8
    group: Tensor | None = None,  # (in,) int32, the group of each column; None: equal parts
) -> Tensor:  # (out, in) float32
    """(code - zero) · scale of int-quantized, torchao's Int8Tensor and IntxUnpackedToInt8Tensor."""
    zero = None if zero is None else _by_rows(zero)
    groups = _Groups(_by_rows(scale), zero, codes.shape[1], group)
    out = torch.empty(codes.shape, device=codes.device)
    for part in pieces(*out.shape):
        out[part] = codes[part]
        groups.apply(out[part], part)
    return out


def unpack_zeros(
    words: Tensor,  # (ceil(out · bits / 32), groups) int32
    bits: int,
    out: int,
) -> Tensor:  # (out, groups) int8
    """weight_zero_point of pack-quantized, which is packed along `out`, unlike the weight."""
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
    zero: Tensor | None = None,  # as scale, int8; only beside a scale
    group: Tensor | None = None,  # (in,) int32; only beside a scale
    symmetric: bool = True,  # a computed scale has no zero
    scale_dtype: torch.dtype = torch.float32,
    draws: Draws | None = None,
) -> Integers:
    """code = w / scale + zero, to nearest, ties to even, within [-2^(bits-1), 2^(bits-1));
    with draws stochastically to one of the two neighbors.

    Computed scales: 2 · amax / (2^bits - 1); asymmetric, (max - min) / (2^bits - 1), the two
    widened to include 0, with zero = -2^(bits-1) - min / scale. For zeros it is the eps of
    `scale_dtype`. All as compressed-tensors does with a float32 weight; a bf16 weight with a bf16
    scale it divides in bf16, which rounds once more.

    A scale of 0 holds zeros, whatever w. Raises ValueError for values that are not finite.
    """
    _check_bits(bits)
    w = w.contiguous()
    low, high = _bounds(bits)
    if scale is None:
        scale, zero = _integer_scale(w, low, high, size or w.shape[1], symmetric, scale_dtype)
    groups = _Groups(_by_rows(scale), zero, w.shape[1], group)
    codes = torch.empty(w.shape, dtype=torch.int8, device=w.device)
    for part in pieces(*w.shape):
        scaled = groups.undo(w[part], part)
        if not all_finite(scaled):
            raise ValueError("the matrix holds values that are not finite")
        level = scaled.round_().clamp_(low, high)
        if draws is not None:
            position = part.start * w.shape[1]
            level = _neighbors(w[part], level, groups, part, bits).draw(draws.at(position))
        codes[part] = level
    return Integers(codes, scale, zero)


def expected_errors(
    w: Tensor,  # (out, in) float32
    bits: int,
    scale: Tensor,  # (out, groups)
    zero: Tensor | None,  # (out, groups) int8
) -> tuple[Tensor, Tensor]:  # (out, groups) float32, (out, groups) bool
    """Of each group: the expected squared error of drawn codes, and whether a value is beyond the
    range of the codes."""
    groups = _Groups(_by_rows(scale), zero, w.shape[1])
    total = torch.empty(len(w), scale.shape[1], device=w.device)
    beyond = torch.empty(total.shape, dtype=torch.bool, device=w.device)
    for part in pieces(*w.shape):
        level = groups.undo(w[part], part).round_().clamp_(*_bounds(bits))
        codes = _neighbors(w[part], level, groups, part, bits)
        total[part] = codes.expected_error().unflatten(1, (scale.shape[1], -1)).sum(2)
        clipped = (codes.gap == 0) & (codes.distance > 0)
        beyond[part] = clipped.unflatten(1, (scale.shape[1], -1)).any(2)
    return total, beyond


def column_rounder(
    bits: int,
    scale: Tensor,  # (out, groups), (out, 1) or one value
    size: int,  # in
    zero: Tensor | None = None,  # as scale, int8
    group: Tensor | None = None,  # (in,) int32, the group of each column; None: equal parts
) -> RoundColumn:
    """To nearest with these scales and zeros, as `encode_integers`."""
    scales, zeros = _by_rows(scale).float(), None if zero is None else _by_rows(zero).float()
    count = scales.shape[1]
    index = None if group is None or count == 1 else group.tolist()

    def round_column(w: Tensor, column: int) -> Tensor:
        at = index[column] if index else column * count // size
        each, middle = scales[:, at], None if zeros is None else zeros[:, at % zeros.shape[1]]
        x = w / torch.where(each == 0, 1.0, each)
        x = (x if middle is None else x.add_(middle)).round_().clamp_(*_bounds(bits))
        return (x if middle is None else x.sub_(middle)).mul_(each)

    return round_column


def requantize_integers(
    w: Tensor,  # (out, in) float32
    bits: int,
    scale: Tensor,  # (out, groups)
    zero: Tensor | None,  # (out, groups) int8
    group: Tensor | None,  # (in,) the group of each column
    symmetric: bool,
    draws: Draws | None = None,
) -> Integers:
    """Codes with each group's stored scale or a new one, whichever is nearer to w.

    With draws, codes are drawn with the stored scale, except of groups that have a value beyond it
    and a smaller expected squared error with a new one.
    """
    (out, width), groups = w.shape, scale.shape[1]
    columns = torch.arange(width, device=w.device)
    order = columns if group is None else torch.argsort(group, stable=True)
    size = width // groups
    if group is not None and not torch.equal(group[order].long(), columns // size):
        return encode_integers(w, bits, scale=scale, zero=zero, group=group, draws=draws)
    codes = torch.empty(w.shape, dtype=torch.int8, device=w.device)
    scales, zeros = scale.clone(), None if zero is None else zero.clone()
    step = max(1, REQUANTIZED // width)
    for first in range(0, out, step):
        rows = slice(first, first + step)
        x = w[rows][:, order] if group is not None else w[rows]
        old_scale, old_zero = scale[rows], None if zero is None else zero[rows]
        new = encode_integers(x, bits, size, symmetric=symmetric, scale_dtype=scale.dtype)
        if draws is None:
            old = encode_integers(x, bits, scale=old_scale, zero=old_zero)
            better = _squared_errors(x, new) < _squared_errors(x, old)
            nearer = torch.where(better.repeat_interleave(size, 1), new.codes, old.codes)
        else:
            error, overflows = expected_errors(x, bits, old_scale, old_zero)
            better = overflows & (expected_errors(x, bits, new.scale, new.zero)[0] < error)
            nearer = None
        scales[rows] = torch.where(better, new.scale, old_scale)
        if zeros is not None and new.zero is not None and old_zero is not None:
            zeros[rows] = torch.where(better, new.zero, old_zero)
        if nearer is None:
            new_zero = None if zeros is None else zeros[rows]
            at = None if draws is None else draws.at(first * width)
            nearer = encode_integers(x, bits, scale=scales[rows], zero=new_zero, draws=at).codes
        codes[first : first + len(x), order] = nearer
    return Integers(codes, scales, zeros)


def _squared_errors(w: Tensor, encoded: Integers) -> Tensor:  # (out, groups)
    error = decode_int8(encoded.codes, encoded.scale, encoded.zero).sub_(w).square_()
    return error.unflatten(1, (encoded.scale.shape[1], -1)).sum(2)


def _bounds(bits: int) -> tuple[int, int]:
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def _neighbors(w: Tensor, level: Tensor, groups: "_Groups", rows: slice, bits: int) -> Neighbors:
    def value(level: Tensor) -> Tensor:
        x = level.float()
        groups.apply(x, rows)
        return x

    falling = None
    if bool((groups.scale < 0).any()):
        falling = value(torch.ones_like(w)) < value(torch.zeros_like(w))
    return neighbors(w, level, value, _bounds(bits), falling)


def _integer_scale(
    w: Tensor, low: int, high: int, size: int, symmetric: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    lows, highs = (w.new_empty(len(w), w.shape[1] // size) for _ in range(2))
    for part in pieces(*w.shape):
        x = w[part].unflatten(1, (-1, size))
        lows[part], highs[part] = x.amin(2).clamp_(max=0), x.amax(2).clamp_(min=0)
    if not bool((lows.isfinite() & highs.isfinite()).all()):
        raise ValueError("the matrix holds values that are not finite")
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
    groups = _Groups(scale.T, zero.T, 2 * codes.shape[1])
    out = torch.empty(len(codes), 2 * codes.shape[1], device=codes.device)
    table = nibble_pairs(SIGNED_NIBBLES, codes.device)
    for part in pieces(*out.shape):
        expand_nibbles(codes[part], table, out[part])
        groups.affine(out[part], part)
    return out


# GPTQ and AWQ


def decode_gptq(
    words: Tensor,  # (ceil(in · bits / 32), out) int32
    zeros: Tensor,  # (groups, ceil(out · bits / 32)) int32
    scale: Tensor,  # (groups, out) float16
    bits: int,
    size: int,  # in
    group: Tensor | None = None,  # (in,) int32: g_idx
    version: int = 1,  # 2 where the config has checkpoint_format gptq_v2
) -> Tensor:  # (out, in) float32
    """(code - zero) · scale. Version 1 stores zero - 1, subtracted from whole words: so 1 is added
    to whole words.

    Codes of 3 bits lie one after another in three words; gptqmodel's planar layout gptq_p of 3, 5,
    6 and 7 bits is another one. Raises ValueError for other numbers of bits and versions.
    """
    if bits not in (2, 3, 4, 8):
        raise ValueError(f"expected 2, 3, 4 or 8 bits, not {bits}")
    groups = _Groups(scale.T, _gptq_zeros(zeros, bits, version, scale.shape[1]).T, size, group)
    out = torch.empty(words.shape[1], size, device=words.device)
    for part in pieces(*out.shape):
        _expand(words[:, part].T, bits, out[part])
        groups.apply(out[part], part)
    return out


def _gptq_zeros(words: Tensor, bits: int, version: int, out: int) -> Tensor:  # (groups, out)
    if version == 2:
        return _unsigned(words, bits, out)
    if version != 1:
        raise ValueError(f"expected version 1 or 2, not {version}")
    if bits == 3:
        return (_unsigned(words, bits, out) + 1).bitwise_and_(7)
    ones = sum(1 << shift for shift in range(0, WORD, bits))
    return _unsigned((words.to(torch.int64) + ones).to(torch.int32), bits, out)


def decode_awq(
    words: Tensor,  # (in, out/8) int32
    zeros: Tensor | None,  # (groups, out/8) int32; None: 8
    scale: Tensor,  # (groups, out) float16
) -> Tensor:  # (out, in) float32
    """(code - zero) · scale of AutoAWQ's gemm layout, 4 bits."""
    zero = torch.full_like(scale, 8).T if zeros is None else _awq_rows(zeros)
    groups = _Groups(scale.T, zero, words.shape[0])
    out = torch.empty(scale.shape[1], words.shape[0], device=words.device)
    for octets in pieces(words.shape[1], 8 * words.shape[0]):
        part = slice(8 * octets.start, 8 * octets.stop)
        out[part] = _awq_rows(words[:, octets])
        groups.apply(out[part], part)
    return out


def _awq_rows(words: Tensor) -> Tensor:  # (m, n) int32 -> (8n, m) uint8
    words = words.T.contiguous()
    codes = torch.empty(len(words), 8, words.shape[1], dtype=torch.uint8, device=words.device)
    for nibble, row in enumerate(AWQ_ORDER):
        codes[:, row] = (words >> 4 * nibble).bitwise_and_(15)
    return codes.flatten(0, 1)


# Shared by the formats.


class _Groups:
    """Scale and zero of each element of a weight, by groups of columns.

    Raises ValueError where the columns do not divide into equal groups and `group` is None.
    """

    def __init__(
        self,
        scale: Tensor,  # (n, groups); n may be 1 for all rows, groups 1 for all columns
        zero: Tensor | None,
        size: int,  # columns
        group: Tensor | None = None,  # (size,)
    ):
        self.scale = scale.float()
        self.zero = zero
        if zero is not None:
            self.zero = zero.float().reshape(1, 1) if zero.numel() == 1 else zero.float()
        count = scale.shape[1]
        equal = size % count == 0
        if group is None and not equal:
            raise ValueError(f"{size} columns do not divide into {count} groups")
        self.index = None  # the group of each column, where they are not equal parts in order
        if group is not None and count > 1:
            index = group.to(torch.int64)
            columns = torch.arange(size, device=index.device)
            in_order = equal and torch.equal(index, columns // (size // count))
            self.index = None if in_order else index

    def apply(self, x: Tensor, rows: slice) -> None:
        """x ← (x - zero) · scale."""
        scale, zero, x = self._parts(x, rows)
        if zero is not None:
            x.sub_(zero)
        x.mul_(scale)

    def affine(self, x: Tensor, rows: slice) -> None:
        """x ← x · scale + zero."""
        scale, zero, x = self._parts(x, rows)
        x.mul_(scale)
        if zero is not None:
            x.add_(zero)

    def undo(self, x: Tensor, rows: slice) -> Tensor:
        """x / scale + zero; a scale of 0 counts as 1."""
        shape = x.shape
        scale, zero, x = self._parts(x, rows)
        x = x / torch.where(scale == 0, 1.0, scale)
        return (x if zero is None else x.add_(zero)).view(shape)

    def _parts(self, x: Tensor, rows: slice) -> tuple[Tensor, Tensor | None, Tensor]:
        """Scale and zero so that they broadcast with x, and x in groups."""
        scale = self.scale if len(self.scale) == 1 else self.scale[rows]
        zero = self.zero
        if zero is not None and len(zero) > 1:
            zero = zero[rows]
        if self.index is not None:
            if zero is not None and zero.shape[1] > 1:
                zero = zero[:, self.index]
            return scale[:, self.index], zero, x
        x = x.view(len(x), scale.shape[1], -1)
        return scale[:, :, None], None if zero is None else zero[:, :, None], x


def _by_rows(scale: Tensor) -> Tensor:  # (n, groups), or (1, 1)
    return scale.reshape(1, 1) if scale.numel() == 1 else scale.reshape(len(scale), -1)


def _expand(
    words: Tensor,  # (n, words) int32
    bits: int,
    out: Tensor,  # (n, m) float32, overwritten
    middle: int = 0,
) -> None:
    """out = code - middle."""
    if bits != 4:
        out.copy_(_unsigned(words, bits, out.shape[1]).sub_(middle))
        return
    values = tuple(float(code - middle) for code in range(16))
    columns = out.shape[1]
    packed = _dense(words).view(torch.uint8)[:, : (columns + 1) // 2]
    whole = out if columns % 2 == 0 else out.new_empty(len(out), 2 * packed.shape[1])
    expand_nibbles(packed, nibble_pairs(values, words.device), whole)
    if whole is not out:
        out.copy_(whole[:, :columns])


def _dense(x: Tensor) -> Tensor:
    """A copy whose last axis has stride 1: contiguous() does not promise that where an axis has one
    element."""
    return x.clone(memory_format=torch.contiguous_format)


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"expected 1 to 8 bits, not {bits}")

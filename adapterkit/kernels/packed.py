"""What packed integers hold: the layouts of compressed-tensors, torchao, GPTQ and AWQ, to float32; the first two also back.

A weight is (code - zero) · scale, in float32: the difference is exact, so the product is the only rounding. The tools do this in
the dtype of their scales; where that is fp16 or bf16 the product is exact in float32, and rounding to it gives their result.

`rows` and `columns` are ranges of the weight (out, in): only that part is decoded.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from adapterkit.kernels.narrow import PIECE, expand_nibbles, nibble_pairs, pack_nibbles, pieces
from adapterkit.kernels.stochastic import Between, Draws, between
from adapterkit.kernels.sums import all_finite

WORD = 32
AWQ_ORDER = (
    0,
    2,
    4,
    6,
    1,
    3,
    5,
    7,
)  # the row of eight that each nibble of a word holds, from the lowest
TWOS = (*map(float, range(8)), *map(float, range(-8, 0)))  # values of nibbles in two's complement


class Integers(NamedTuple):
    codes: Tensor  # (out, in) int8
    scale: Tensor  # (out, groups)
    zero: Tensor | None  # (out, groups) int8


# codes in words


def pack(
    codes: Tensor,  # (n, m) int8, from -2^(bits-1)
    bits: int,
) -> Tensor:  # (n, ceil(m · bits / 32)) int32
    """Bits of code + 2^(bits-1), one code after another from the lowest bit on, across words if need be; 0 after the last.

    Older compressed-tensors left bits unused where `bits` does not divide 32.
    """
    _check_bits(bits)
    (n, m), codes = codes.shape, _dense(codes)
    words = math.ceil(m * bits / WORD)
    if bits in (4, 8):
        codes = pad((codes + (1 << (bits - 1))).to(torch.uint8), (0, words * WORD // bits - m))
        return (pack_nibbles(codes) if bits == 4 else codes).view(torch.int32)
    codes = codes.to(torch.int64).add_(1 << (bits - 1))
    shifts = torch.arange(0, 8 * bits, bits, device=codes.device)
    eights = (pad(codes, (0, -m % 8)).view(n, -1, 8) << shifts).sum(
        2
    )  # no bit twice, so a sum is an or
    text = eights.view(torch.uint8).view(n, -1, 8)[:, :, :bits].reshape(n, -1)
    return pad(text, (0, 4 * words - text.shape[1])).view(torch.int32)


def unpack(
    words: Tensor,  # (n, ceil(m · bits / 32)) int32
    bits: int,
    m: int,
) -> Tensor:  # (n, m) int8, from -2^(bits-1)
    return (_unsigned(words, bits, m) - (1 << (bits - 1))).to(torch.int8)


def _unsigned(words: Tensor, bits: int, m: int) -> Tensor:  # (n, m) int16
    _check_bits(bits)
    text = _dense(words).view(torch.uint8)
    if bits == 8:
        return text[:, :m].to(torch.int16)
    text = pad(text, (0, -text.shape[1] % bits)).view(len(text), -1, bits)
    eights = pad(text, (0, 8 - bits)).view(torch.int64)  # (n, ceil(m/8), 1)
    shifts = torch.arange(0, 8 * bits, bits, device=words.device)
    return (
        (eights >> shifts).bitwise_and_((1 << bits) - 1).to(torch.int16).view(len(text), -1)[:, :m]
    )


# compressed-tensors


def decode_packed(
    words: Tensor,  # (out, ceil(in · bits / 32)) int32
    scale: Tensor,  # (out, groups), (out, 1) or one value
    bits: int,
    size: int,  # in
    zero: Tensor | None = None,  # (out, groups) int8, unpacked
    group: Tensor
    | None = None,  # (in,) int32, the group of each column; equal parts in order if not given
    rows: slice = slice(None),
    columns: slice = slice(None),
) -> Tensor:  # float32
    """pack-quantized: int4 and int8, any number of bits."""
    first, last, _ = columns.indices(size)
    words, scale, zero = (
        words[rows],
        _rows(scale, rows),
        None if zero is None else _rows(zero, rows),
    )
    start = first // WORD * WORD
    words = words[:, start // WORD * bits : math.ceil(last * bits / WORD)]
    groups = _Groups(scale, zero, size, group, first, last)
    out = torch.empty(len(words), last - first, device=words.device)
    for part in pieces(*out.shape):
        _values(words[part], bits, first - start, out[part], 1 << (bits - 1))
        groups.apply(out[part], part)
    return out


def decode_int8(
    codes: Tensor,  # (out, in) int8
    scale: Tensor,  # (out, groups), (out, 1) or one value
    zero: Tensor | None = None,  # as scale, int8
    group: Tensor | None = None,  # (in,) int32
    rows: slice = slice(None),
    columns: slice = slice(None),
) -> Tensor:  # float32
    """int-quantized; torchao's Int8Tensor and IntxUnpackedToInt8Tensor."""
    first, last, _ = columns.indices(codes.shape[1])
    scale, zero = _rows(scale, rows), None if zero is None else _rows(zero, rows)
    groups = _Groups(scale, zero, codes.shape[1], group, first, last)
    codes = codes[rows, first:last]
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
    """weight_zero_point of pack-quantized, packed along the other axis than the weight."""
    return unpack(words.T, bits, out).T.contiguous()


def pack_zeros(
    zero: Tensor,  # (out, groups) int8
    bits: int,
) -> Tensor:  # (ceil(out · bits / 32), groups) int32
    return pack(zero.T, bits).T.contiguous()


def encode_integers(
    w: Tensor,  # (out, in) float32
    bits: int,
    size: int | None = None,  # columns with one scale; all of a row if not given
    scale: Tensor | None = None,  # (out, groups), (out, 1) or one value; made from w if not given
    zero: Tensor | None = None,  # as scale, int8; with a scale that is given
    group: Tensor | None = None,  # (in,) int32; with a scale that is given
    symmetric: bool = True,  # of a scale that is made: no zero
    scale_dtype: torch.dtype = torch.float32,
    draws: Draws | None = None,
) -> Integers:
    """code = w / scale + zero, rounded to nearest, ties to even, within [-2^(bits-1), 2^(bits-1)); drawn from the two neighbours if
    there are draws.

    A scale that is made is 2 · amax / (2^bits - 1); asymmetric, (max - min) / (2^bits - 1), the two widened to hold 0, with
    zero = -2^(bits-1) - min / scale. For zeros it is the eps of `scale_dtype`. All this is compressed-tensors' way with a float32
    weight; a bf16 weight with a bf16 scale it divides in bf16, which rounds once more.

    A given scale of 0 holds zeros, whatever w. Raises ValueError for values that are not finite.
    """
    _check_bits(bits)
    w = w.contiguous()
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    if scale is None:
        scale, zero = _integer_scale(w, low, high, size or w.shape[1], symmetric, scale_dtype)
    groups = _Groups(_rows(scale, slice(None)), zero, w.shape[1], group, 0, w.shape[1])
    codes = torch.empty(w.shape, dtype=torch.int8, device=w.device)
    for part in pieces(*w.shape):
        scaled = groups.undo(w[part], part)
        if not all_finite(scaled):
            raise ValueError("the matrix holds values that are not finite")
        level = scaled.round_().clamp_(low, high)
        if draws is not None:
            level = _between(w[part], level, groups, part, bits).drawn(
                draws.at(part.start * w.shape[1])
            )
        codes[part] = level
    return Integers(codes, scale, zero)


def expected_errors(
    w: Tensor,  # (out, in) float32
    bits: int,
    scale: Tensor,  # (out, groups)
    zero: Tensor | None,  # (out, groups) int8
) -> tuple[Tensor, Tensor]:  # (out, groups) float32, (out, groups) bool
    """The expected squared error of each group whose codes are drawn beside this scale, and whether a value is beyond the codes."""
    groups, low, high = (
        _Groups(_rows(scale, slice(None)), zero, w.shape[1], None, 0, w.shape[1]),
        -(1 << (bits - 1)),
        (1 << (bits - 1)) - 1,
    )
    total = torch.empty(len(w), scale.shape[1], device=w.device)
    beyond = torch.empty(total.shape, dtype=torch.bool, device=w.device)
    for part in pieces(*w.shape):
        found = _between(
            w[part], groups.undo(w[part], part).round_().clamp_(low, high), groups, part, bits
        )
        total[part] = found.spread().unflatten(1, (scale.shape[1], -1)).sum(2)
        beyond[part] = (
            ((found.gap == 0) & (found.away > 0)).unflatten(1, (scale.shape[1], -1)).any(2)
        )
    return total, beyond


def _between(w: Tensor, level: Tensor, groups: "_Groups", rows: slice, bits: int) -> Between:
    def value(level: Tensor) -> Tensor:
        x = level.float()
        groups.apply(x, rows)
        return x

    falling = (
        value(torch.ones_like(w)) < value(torch.zeros_like(w))
        if bool((groups.scale < 0).any())
        else None
    )
    return between(w, level, value, (-(1 << (bits - 1)), (1 << (bits - 1)) - 1), falling)


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
    rows: slice = slice(None),
    columns: slice = slice(None),
) -> Tensor:  # float32
    """Int4Tensor (plain): code · scale + zero, two roundings."""
    size = 2 * codes.shape[1]
    first, last, _ = columns.indices(size)
    groups = _Groups(scale.T[rows], zero.T[rows], size, None, first, last)
    codes = codes[rows, first // 2 : (last + 1) // 2]
    out = torch.empty(len(codes), last - first, device=codes.device)
    table = nibble_pairs(TWOS, codes.device)
    for part in pieces(*out.shape):
        _nibbles(codes[part], table, first % 2, out[part])
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
    rows: slice = slice(None),
    columns: slice = slice(None),
) -> Tensor:  # float32
    """(code - zero) · scale. Version 1 stores zero - 1, subtracted from whole words, so it is added to whole words.

    3 bits lie one after another across three words; gptqmodel's gptq_p (planar) layout of 3, 5, 6 and 7 bits is another one.
    """
    if bits not in (2, 3, 4, 8):
        raise ValueError(f"expected 2, 3, 4 or 8 bits, not {bits}")
    first, last, _ = columns.indices(size)
    top, bottom, _ = rows.indices(words.shape[1])
    zero = _gptq_zeros(zeros, bits, version, scale.shape[1])[:, top:bottom]
    groups = _Groups(scale[:, top:bottom].T, zero.T, size, group, first, last)
    start = first // WORD * WORD
    words = words[start // WORD * bits : math.ceil(last * bits / WORD), top:bottom]
    out = torch.empty(bottom - top, last - first, device=words.device)
    for part in pieces(*out.shape):
        _values(words[:, part].T, bits, first - start, out[part])
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
    zeros: Tensor | None,  # (groups, out/8) int32; 8 if not given
    scale: Tensor,  # (groups, out) float16
    rows: slice = slice(None),
    columns: slice = slice(None),
) -> Tensor:  # float32
    """(code - zero) · scale of AutoAWQ's gemm layout, 4 bits."""
    first, last, _ = columns.indices(words.shape[0])
    top, bottom, _ = rows.indices(scale.shape[1])
    zero = torch.full_like(scale, 8) if zeros is None else _awq_rows(zeros).T[:, : scale.shape[1]]
    groups = _Groups(
        scale[:, top:bottom].T, zero[:, top:bottom].T, words.shape[0], None, first, last
    )
    out = torch.empty(bottom - top, last - first, device=words.device)
    step = max(1, PIECE // 8 // max(1, last - first)) * 8
    for begin in range(top // 8 * 8, bottom, step):
        end = min(begin + step, bottom)
        codes = _awq_rows(words[first:last, begin // 8 : math.ceil(end / 8)])
        part = slice(max(begin, top) - top, end - top)
        out[part] = codes[max(top - begin, 0) : end - begin]
        groups.apply(out[part], part)
    return out


def _awq_rows(words: Tensor) -> Tensor:  # (m, n) int32 -> (8n, m) uint8
    words = words.T.contiguous()
    codes = torch.empty(len(words), 8, words.shape[1], dtype=torch.uint8, device=words.device)
    for nibble, row in enumerate(AWQ_ORDER):
        codes[:, row] = (words >> 4 * nibble).bitwise_and_(15)
    return codes.flatten(0, 1)


# shared


class _Groups:
    """Scale and zero of each element, for columns first to last of some rows."""

    def __init__(
        self,
        scale: Tensor,  # (n, groups); n may be 1 for all rows, groups 1 for all columns
        zero: Tensor | None,
        size: int,  # of a row
        group: Tensor | None,  # (size,)
        first: int,
        last: int,
    ):
        self.scale = scale.float()
        self.zero = (
            None
            if zero is None
            else (zero.float().reshape(1, 1) if zero.numel() == 1 else zero.float())
        )
        count = scale.shape[1]
        each = math.ceil(size / count)
        if group is None and size % count:
            raise ValueError(f"{size} columns do not divide into {count} groups")
        index = None
        if group is not None:
            index = group[first:last].to(torch.int64)
            if torch.equal(index, torch.arange(first, last, device=index.device) // each):
                index = None
        if index is None and count > 1 and (first % each or last % each):
            index = torch.arange(first, last, device=scale.device) // each
        if index is None and count > 1:
            self._pick(slice(first // each, last // each))
        self.index = index if count > 1 else None

    def _pick(self, groups: slice) -> None:
        self.scale = self.scale[:, groups]
        self.zero = (
            self.zero if self.zero is None or self.zero.shape[1] == 1 else self.zero[:, groups]
        )

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
        """x / scale + zero, scales of 0 taken as 1."""
        shape = x.shape
        scale, zero, x = self._parts(x, rows)
        x = x / torch.where(scale == 0, 1.0, scale)
        return (x if zero is None else x.add_(zero)).view(shape)

    def _parts(self, x: Tensor, rows: slice) -> tuple[Tensor, Tensor | None, Tensor]:
        """Both so that they broadcast with x, and x in groups."""
        scale, zero = (
            None if t is None else t if len(t) == 1 else t[rows] for t in (self.scale, self.zero)
        )
        assert scale is not None
        if self.index is not None:
            return scale[:, self.index], None if zero is None else _columns(zero, self.index), x
        x = x.view(len(x), scale.shape[1], -1)
        return scale[:, :, None], None if zero is None else zero[:, :, None], x


def _columns(zero: Tensor, index: Tensor) -> Tensor:
    return zero if zero.shape[1] == 1 else zero[:, index]


def _rows(scale: Tensor, rows: slice) -> Tensor:
    """(n, groups), or (1, 1)."""
    return scale.reshape(1, 1) if scale.numel() == 1 else scale.reshape(len(scale), -1)[rows]


def _values(
    words: Tensor,  # (n, words) int32
    bits: int,
    skip: int,  # codes before the first that is wanted
    out: Tensor,  # (n, m) float32, takes the codes
    middle: int = 0,  # what is taken from each
) -> None:
    if bits == 4:
        table = nibble_pairs(tuple(float(code - middle) for code in range(16)), words.device)
        _nibbles(_dense(words).view(torch.uint8)[:, skip // 2 :], table, skip % 2, out)
    else:
        out.copy_(_unsigned(words, bits, skip + out.shape[1])[:, skip:].sub_(middle))


def _nibbles(packed: Tensor, table: Tensor, skip: int, out: Tensor) -> None:
    """Values of nibbles from `skip` on."""
    packed = packed[:, : (skip + out.shape[1] + 1) // 2]
    if skip == 0 and out.shape[1] % 2 == 0:
        return expand_nibbles(packed, table, out)
    whole = out.new_empty(len(out), 2 * packed.shape[1])
    expand_nibbles(packed, table, whole)
    out.copy_(whole[:, skip : skip + out.shape[1]])


def _dense(x: Tensor) -> Tensor:
    """A copy whose last axis has stride 1, which contiguous() does not promise where an axis has one element."""
    return x.clone(memory_format=torch.contiguous_format)


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"expected 1 to 8 bits, not {bits}")

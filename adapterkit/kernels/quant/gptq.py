"""Weights of GPTQ and AWQ: integers in words of 32 bits, stored (in, out), with a scale and a zero
for each group of columns.

When it is encoded again, a group keeps its scale and zero, or gets new ones if those lose less.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from adapterkit.kernels.quant.grid import pieces
from adapterkit.kernels.quant.integers import (
    WORD,
    IntegerGrid,
    Integers,
    code_ends,
    expand_codes,
    grid_of,
    pack,
    requantize_integers,
    unpack,
    unsigned_codes,
)
from adapterkit.kernels.quant.stochastic import Draws

BITS = (2, 3, 4, 8)
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the row of eight that each nibble of a word holds
# scales that are tried, in parts of the one that holds all values of a group
TRIED = {
    2: (1.0, 0.85, 0.72, 0.6, 0.5, 0.42),
    3: (1.0, 0.9, 0.8, 0.72, 0.64),
    4: (1.0, 0.95, 0.9, 0.85, 0.8),
    8: (1.0, 0.99),
}


class WordTensors(NamedTuple):
    """The stored tensors of a weight (out, in)."""

    words: Tensor  # of codes
    zeros: Tensor | None  # in words, too
    scale: Tensor  # (groups, out)


# GPTQ


def gptq_grid(
    old: WordTensors,  # words (ceil(in · bits / 32), out), zeros (groups, ceil(out · bits / 32))
    bits: int,
    size: int,  # in
    group: Tensor | None = None,  # (in,) int32: g_idx
    version: int = 1,  # 2 where the config has checkpoint_format gptq_v2
) -> IntegerGrid:
    """(code - zero) · scale, with codes and zeros relative to the middle, 2^(bits-1). Version 1
    stores zero - 1, subtracted from whole words, so 1 is added to whole words.

    Codes of 3 bits are consecutive in three words; gptqmodel's planar layout gptq_p of 3, 5, 6 and
    7 bits differs. Raises ValueError for other numbers of bits and versions.
    """
    if bits not in BITS:
        raise ValueError(f"expected 2, 3, 4 or 8 bits, not {bits}")
    zero = _gptq_zero(old, bits, version)
    return grid_of(old.scale.T, zero, (len(zero), size), group, bits)


def decode_gptq(
    old: WordTensors, bits: int, size: int, group: Tensor | None = None, version: int = 1
) -> Tensor:  # (out, in) float32
    """Decode as `gptq_grid`."""
    grid = gptq_grid(old, bits, size, group, version)
    out = torch.empty(old.words.shape[1], size, device=old.words.device)
    middle = 1 << (bits - 1)
    return grid.decode(out, lambda rows, x: expand_codes(old.words[:, rows].T, bits, x, middle))


def requantize_gptq(
    w: Tensor,  # (out, in) float32
    old: WordTensors,
    bits: int,
    group: Tensor | None = None,
    version: int = 1,
    *,
    keep_zeros: bool,  # those of a symmetric weight, which some kernels do not read
    draws: Draws | None = None,
) -> WordTensors:
    """Encode as `requantize_integers`, with searched scales; unchanged groups keep their bits. New
    zeros are never 0, so that all readers of version 1 agree on them."""
    zero = _gptq_zero(old, bits, version)
    result = _requantized(
        w,
        Integers(unpack(old.words.T, bits, w.shape[1]), old.scale.T, zero),
        bits,
        group,
        lowest=None if keep_zeros else int(version == 1),
        draws=draws,
    )
    assert old.zeros is not None and result.zero is not None
    zeros = _gptq_words(result.zero, bits, version)
    zeros = torch.where(zeros == _gptq_words(zero, bits, version), old.zeros, zeros)
    return WordTensors(pack(result.codes, bits).T.contiguous(), zeros, result.scale.T.contiguous())


def _gptq_zero(old: WordTensors, bits: int, version: int) -> Tensor:  # (out, groups) int8
    words, out, half = old.zeros, old.scale.shape[1], 1 << (bits - 1)
    assert words is not None
    if version not in (1, 2):
        raise ValueError(f"expected version 1 or 2, not {version}")
    if version == 1 and bits != 3:
        words = (words.long() + _ones(bits)).int()
    zero = unsigned_codes(words, bits, out)
    if version == 1 and bits == 3:
        zero = (zero + 1).bitwise_and_(7)
    return (zero - half).to(torch.int8).T


def _gptq_words(zero: Tensor, bits: int, version: int) -> Tensor:
    """The inverse of `_gptq_zero`; 0 beyond the last zero, before version 1 subtracts."""
    half = 1 << (bits - 1)
    if version == 1 and bits == 3:
        zero = (zero + (half - 1)).bitwise_and_(7) - half
    words = pack(zero.T, bits)
    return (words.long() - _ones(bits)).int() if version == 1 and bits != 3 else words


def _ones(bits: int) -> int:
    return sum(1 << shift for shift in range(0, WORD, bits))


# AWQ


def awq_grid(
    old: WordTensors,  # words (in, out/8), zeros (groups, out/8); None: all are the middle code
) -> IntegerGrid:
    """(code - zero) · scale of AutoAWQ's gemm layout, 4 bits, without the middle code, 8."""
    return grid_of(old.scale.T, _awq_zero(old), (old.scale.shape[1], len(old.words)), bits=4)


def decode_awq(old: WordTensors) -> Tensor:  # (out, in) float32
    """Decode as `awq_grid`."""
    grid = awq_grid(old)
    out = torch.empty(old.scale.shape[1], len(old.words), device=old.words.device)
    for octets in pieces((old.words.shape[1], 8 * len(old.words)), out.device):
        part = slice(8 * octets.start, 8 * octets.stop)
        out[part] = _awq_rows(old.words[:, octets])
        x, scales = grid.place(out[part], part)
        grid.multiplied(x, *scales)
    return out


def requantize_awq(
    w: Tensor,  # (out, in) float32
    old: WordTensors,
    *,
    keep_zeros: bool,
    draws: Draws | None = None,
) -> WordTensors:
    """Encode as `requantize_gptq`."""
    result = _requantized(
        w,
        Integers(_awq_rows(old.words), old.scale.T, _awq_zero(old)),
        4,
        None,
        lowest=None if keep_zeros or old.zeros is None else 0,
        draws=draws,
    )
    assert result.zero is not None
    zeros = None if old.zeros is None else _awq_words(result.zero)
    return WordTensors(_awq_words(result.codes), zeros, result.scale.T.contiguous())


def _awq_zero(old: WordTensors) -> Tensor:  # (out, groups) int8
    if old.zeros is None:
        return torch.zeros(old.scale.T.shape, dtype=torch.int8, device=old.scale.device)
    return _awq_rows(old.zeros)


def _awq_rows(words: Tensor) -> Tensor:  # (m, n) int32 -> (8n, m) int8
    words = words.T.contiguous()
    codes = (words[:, None] >> _awq_shifts(words.device)).bitwise_and_(15)
    return codes.to(torch.int8).sub_(8).flatten(0, 1)


def _awq_words(codes: Tensor) -> Tensor:  # the inverse
    eights = codes.int().add_(8).unflatten(0, (-1, 8)) << _awq_shifts(codes.device)
    return eights.sum(1, dtype=torch.int32).T.contiguous()  # no bit twice: the sum is or


@functools.cache
def _awq_shifts(device: torch.device) -> Tensor:  # (8, 1) int32
    """The bits below the nibble of each row."""
    return (4 * torch.tensor(AWQ_ORDER).argsort().int())[:, None].to(device)


def gemv_grid(
    old: WordTensors,  # words (out, in/8), zeros (out, n/8), scale (out, n); n beyond groups unused
    groups: int,
) -> IntegerGrid:
    """(code - zero) · scale of AutoAWQ's gemv layout, 4 bits, all in order along the columns."""
    shape = len(old.words), 8 * old.words.shape[1]
    return grid_of(old.scale[:, :groups], _gemv_zero(old, groups), shape, bits=4)


def decode_gemv(old: WordTensors, groups: int) -> Tensor:  # (out, in) float32
    """Decode as `gemv_grid`."""
    out = torch.empty(len(old.words), 8 * old.words.shape[1], device=old.words.device)
    expand = lambda rows, x: expand_codes(old.words[rows], 4, x, 8)
    return gemv_grid(old, groups).decode(out, expand)


def requantize_gemv(
    w: Tensor,  # (out, in) float32
    old: WordTensors,
    groups: int,
    *,
    keep_zeros: bool,
    draws: Draws | None = None,
) -> WordTensors:
    """Encode as `requantize_gptq`; padding after the groups does not change."""
    lowest = None if keep_zeros else 0
    codes, zero = unpack(old.words, 4, w.shape[1]), _gemv_zero(old, groups)
    stored = Integers(codes, old.scale[:, :groups], zero)
    result = _requantized(w, stored, 4, None, lowest=lowest, draws=draws)
    assert result.zero is not None
    scale = old.scale.clone()
    zero = _gemv_zero(old, scale.shape[1])
    scale[:, :groups], zero[:, :groups] = result.scale, result.zero
    return WordTensors(pack(result.codes, 4), pack(zero, 4), scale)


def _gemv_zero(old: WordTensors, count: int) -> Tensor:  # (out, count) int8
    assert old.zeros is not None
    return unpack(old.zeros, 4, count)


# Shared by all.


def _requantized(
    w: Tensor,
    old: Integers,
    bits: int,
    group: Tensor | None,
    lowest: int | None,
    draws: Draws | None,
) -> Integers:
    """Encode; `lowest`: of new zeros, from 0; None if they stay."""

    assert old.zero is not None
    new_scale = functools.partial(
        search_scales,
        bits=bits,
        dtype=old.scale.dtype,
        zero=old.zero,
        lowest=lowest,
        sampled=draws is not None,
    )
    result = requantize_integers(w, bits, old.scale, old.zero, group, new_scale, draws)
    empty = result.scale == 0
    if bool(empty.any()):  # whatever its codes, such a group holds zeros: they stay
        each = w.shape[1] // empty.shape[1]
        empty = empty.repeat_interleave(each, 1) if group is None else empty[:, group.long()]
        return result._replace(codes=torch.where(empty, old.codes, result.codes))
    return result


def search_scales(
    w: Tensor,  # (out, in) float32, its columns in groups of one size
    bits: int,
    dtype: torch.dtype,
    zero: Tensor,  # (out, groups) int8, from -2^(bits-1)
    lowest: int | None,  # of new zeros, from 0; None: they stay
    sampled: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Scales in `dtype`, and zeros: for sampled codes the smallest that cover all values, else
    those with the least squared error of a few."""
    scale, new = torch.empty(zero.shape, dtype=dtype, device=w.device), zero.clone()
    low, high = code_ends(bits)
    for rows in pieces(w.shape, w.device):
        x = w[rows].unflatten(1, (zero.shape[1], -1))
        least, most, zeros = x.amin(2).clamp_(max=0), x.amax(2).clamp_(min=0), zero[rows].float()
        if lowest is not None:
            exact = low - (least / (most - least)).nan_to_num_(0.0) * (high - low)
            zeros = torch.stack([exact.floor(), exact.ceil()]).clamp_(low + lowest, high)
        zeros = zeros.view(-1, *least.shape)
        below = torch.where(zeros == low, 0.0, least / (low - zeros))
        above = torch.where(zeros == high, 0.0, most / (high - zeros))
        scales = torch.maximum(below, above)
        if sampled:
            scales, errors = _stored(scales, dtype), scales
        else:
            scales, errors = _fitted(x, bits, dtype, zeros, scales)
        best = errors.argmin(0, keepdim=True)
        scale[rows] = scales.gather(0, best)[0].to(dtype)
        new[rows] = zeros.gather(0, best % len(zeros))[0].to(torch.int8)
    return scale, None if lowest is None else new


def _fitted(
    x: Tensor,  # (n, groups, size)
    bits: int,
    dtype: torch.dtype,
    zeros: Tensor,  # (zeros, n, groups)
    whole: Tensor,  # as zeros: the scales that cover all values
) -> tuple[Tensor, Tensor]:  # (tried · zeros, n, groups)
    """Scales fitted to the nearest codes of candidates, and the squared errors."""
    low, high = ((end - zeros)[..., None] for end in code_ends(bits))
    scales, products, squares, errors = [], [], [], []
    for part in TRIED[bits]:
        for number, scale in enumerate(_stored(whole * part, dtype)):
            level = (x / scale[..., None]).round_().clamp_(low[number], high[number])
            rest = torch.addcmul(x, level, scale[..., None], value=-1)
            scales.append(scale)
            products.append((level * rest).sum(2))
            squares.append(level.square_().sum(2))
            errors.append(rest.square_().sum(2))
    scale, product, square, error = map(torch.stack, (scales, products, squares, errors))
    fitted = _stored(scale + (product / square).nan_to_num_(0.0), dtype)
    more = fitted - scale
    return fitted, error + more * (more * square - 2 * product)


def _stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest storable scale above 0, in float32."""
    info = torch.finfo(dtype)
    return scale.clamp(info.smallest_normal, info.max).to(dtype).float()

"""Weights of MLX's affine mode: unsigned integers, a scale and a bias for each group of columns.

A weight is code · scale + bias in float32, two roundings. mlx does the same for float32 scales; for
fp16 and bf16 it rounds the product and the sum to that dtype. Codes are a stream of bits, one code
after another from the lowest bit of 32-bit words.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from adapterkit.kernels.quant.grid import Grid, check_finite, chosen, loses_less, pieces
from adapterkit.kernels.quant.integers import expand_codes, pack, unsigned_codes
from adapterkit.kernels.quant.stochastic import Draws

BITS = (2, 3, 4, 5, 6, 8)
LEAST = 1e-7  # mlx's smallest scale, before it fits the larger end


class Affine(NamedTuple):
    """code · scale + bias."""

    words: Tensor  # (out, in · bits / 32) uint32
    scale: Tensor  # (out, groups)
    bias: Tensor  # as scale


@dataclass(frozen=True, kw_only=True)
class AffineGrid(Grid):
    """code · scale + bias, by groups of columns; the second scale is the bias."""

    def scaled(self, x: Tensor, *scales: Tensor) -> Tensor:
        scale, bias = scales
        return (x - bias).div_(torch.where(scale == 0, 1.0, scale))

    def multiplied(self, level: Tensor, *scales: Tensor) -> Tensor:
        return level.mul_(scales[0]).add_(scales[1])


def affine_grid(
    scale: Tensor,  # (out, groups)
    bias: Tensor,  # as scale
    bits: int,
    size: int,  # columns with one scale
) -> AffineGrid:
    """The values that codes of that many bits can take."""
    scales = (scale.float().contiguous(), bias.float().contiguous())
    return AffineGrid(scales=scales, block=(1, size), ends=(0, (1 << bits) - 1))


def decode_affine(old: Affine, bits: int) -> Tensor:  # (out, in) float32
    """code · scale + bias."""
    out = torch.empty(len(old.words), _columns(old.words, bits), device=old.words.device)
    grid = affine_grid(old.scale, old.bias, bits, out.shape[1] // old.scale.shape[1])
    return grid.decode(out, lambda rows, x: expand_codes(old.words[rows], bits, x))


def affine_scales(
    w: Tensor,  # (out, in) float32
    bits: int,
    size: int,  # columns with one scale
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # (out, groups) of dtype
    """Scales and biases by mlx's rule, rounded to `dtype`.

    The bias is the end of larger magnitude, w_e, with code 0; the scale points to the other end:
    s = ±max((max - min) / (2^bits - 1), 1e-7), then s = w_e / round(w_e / s), so that 0 has a code.
    If w_e / s rounds to 0, s stays and the bias is 0. mlx chooses codes before it rounds the scales
    to the dtype of the weight; here they are chosen afterwards. Raises ValueError for values that
    are not finite.
    """
    groups = w.unflatten(1, (-1, size))
    low, high = groups.amin(2), groups.amax(2)
    check_finite(low + high)
    falls = low.abs() <= high.abs()
    scale = ((high - low) / ((1 << bits) - 1)).clamp_(min=LEAST)
    scale = torch.where(falls, -scale, scale)
    edge = torch.where(falls, high, low)
    steps = (edge / scale).round_()
    has_zero = steps != 0
    scale = torch.where(has_zero, edge / torch.where(has_zero, steps, 1.0), scale)
    return scale.to(dtype), torch.where(has_zero, edge, 0.0).to(dtype)


def requantize_affine(
    w: Tensor,  # (out, in) float32
    old: Affine,
    bits: int,
    draws: Draws | None = None,
) -> Affine:
    """Codes with each group's stored scale and bias or new ones of `affine_scales`, whichever are
    nearer to w; with draws codes are sampled, and only groups with values beyond the old scale may
    get a new one. Codes whose value does not change keep their bits."""
    size, rows = w.shape[1] // old.scale.shape[1], w.contiguous()
    new = affine_scales(rows, bits, size, old.scale.dtype)
    before, after = (
        affine_grid(scale, bias, bits, size) for scale, bias in ((old.scale, old.bias), new)
    )
    if draws is None:
        better = after.errors(rows, sampled=False) < before.errors(rows, sampled=False)
    else:
        better = loses_less(rows, before, after)
    scale, bias = (chosen(better, *pair) for pair in zip(new, old[1:], strict=True))
    grid = affine_grid(scale, bias, bits, size)
    codes = grid.encoded(rows, torch.empty(w.shape, dtype=torch.uint8, device=w.device), draws)
    for part in pieces(w.shape, w.device):  # several codes may have one value: scales of 0
        stored = unsigned_codes(old.words[part], bits, w.shape[1]).to(torch.uint8)
        x, scales = grid.place(rows[part], part)
        same = grid.value(stored.view(x.shape), *scales) == x
        codes[part] = torch.where(same.view(stored.shape), stored, codes[part])
    middle = 1 << (bits - 1)
    words = pack((codes - middle).view(torch.int8), bits).view(old.words.dtype)
    return Affine(words, scale, bias)


def _columns(words: Tensor, bits: int) -> int:
    return words.shape[1] * 32 // bits

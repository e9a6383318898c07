"""Weights of MLX: codes of 2 to 8 bits in words, one after another from the lowest bit, with scales
of groups of columns.

A weight of the affine mode is code · scale + bias in float32, two roundings. mlx does the same for
float32 scales; for fp16 and bf16 it rounds the product and the sum to that dtype.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adapterkit.kernels.quant.grid import WORD, Grid, check_finite, chosen, loses_less, pieces
from adapterkit.kernels.quant.integers import expand_codes, pack, unsigned_codes
from adapterkit.kernels.quant.stochastic import Draws

LEAST = 1e-7  # mlx's smallest scale, before it fits the larger end


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


def decode_words(
    words: Tensor,  # (out, in · bits / 32) uint32
    bits: int,
    grid: Grid,
) -> Tensor:  # (out, in) float32
    """The values of packed codes."""
    out = torch.empty(len(words), words.shape[1] * WORD // bits, device=words.device)

    def expand(rows: slice, x: Tensor) -> None:
        if isinstance(grid, AffineGrid):
            expand_codes(words[rows], bits, x)
        else:
            x.copy_(grid.level(unsigned_codes(words[rows], bits, x.shape[1]).int()))

    return grid.decode(out, expand)


def requantize_words(
    w: Tensor,  # (out, in) float32
    words: Tensor,  # (out, in · bits / 32) uint32, as stored
    bits: int,
    old: Sequence[Tensor],  # the stored scales, (out, groups) each
    new: Sequence[Tensor],  # as old
    grid_of: Callable[[Sequence[Tensor]], Grid],
    draws: Draws | None = None,
) -> list[Tensor]:  # words and scales
    """Codes with each group's stored scales or new ones, whichever are nearer to w; with draws
    codes are sampled, and only groups with values beyond the old scale may get a new one. Codes
    whose value does not change keep their bits."""
    before, after = grid_of(old), grid_of(new)
    if draws is None:
        better = after.errors(w, sampled=False) < before.errors(w, sampled=False)
    else:
        better = loses_less(w, before, after)
    scales = [chosen(better, *pair) for pair in zip(new, old, strict=True)]
    grid = grid_of(scales)
    codes = grid.encoded(w, torch.empty(w.shape, dtype=torch.uint8, device=w.device), draws)
    for rows in pieces(w.shape, w.device):  # several codes may have one value: scales of 0, and -0
        stored = unsigned_codes(words[rows], bits, w.shape[1])
        x, own = grid.place(w[rows], rows)
        same = grid.value(stored.int().view(x.shape), *own) == x
        codes[rows] = torch.where(same.view(stored.shape), stored.to(torch.uint8), codes[rows])
    packed = pack((codes - (1 << (bits - 1))).view(torch.int8), bits)
    return [packed.view(words.dtype), *scales]

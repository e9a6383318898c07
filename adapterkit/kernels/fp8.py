"""FP8 with scales, to float32 and back.

Decoding is code · scale in float32, rounded once. Encoding with the stored scales gives the codes
back for every code (-0 and NaN included) whose product with its scale stays within float32; scales
computed anew may differ for the same values. Codes are rounded to nearest, ties to even, or with
`draws` stochastically, and saturate.

A weight is whole rows. A part of its rows can be encoded alone where it begins with a block.
"""

import functools
import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from adapterkit.kernels.common import (
    RoundColumn,
    Scaled,
    block_amax,
    check_finite,
    matrices,
    pieces,
    scale_as_float,
)
from adapterkit.kernels.stochastic import Draws, Neighbors, neighbors

FP8_MAX = 448.0

Fp8Rule = Literal["divide", "multiply", "power"]


def decode_fp8(
    codes: Tensor,  # (..., out, in) float8_e4m3fn, float8_e5m2, ...
    scale: Tensor,  # (..., ceil(out/h), ceil(in/w)) any float, or uint8 (E8M0); or one value
    block: tuple[int, int],  # (h, w): (128, 128), per channel (1, in), per tensor (out, in)
) -> Tensor:  # (..., out, in) float32
    """code · scale.

    transformers (fp8) does just this and rounds to the weight's dtype. compressed-tensors computes
    in the scale's dtype: for a bf16 or fp16 scale, rounding to that gives its result, since the
    product of the two is exact in float32.
    """
    out = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    table = _values(codes.dtype, codes.device)
    grids = _grid(scale_as_float(scale), codes.shape, block)
    for code, grid, w in matrices(codes.contiguous().view(torch.uint8), grids, out):
        for rows in pieces(*w.shape):
            torch.index_select(table, 0, code[rows].flatten().int(), out=w[rows].view(-1))
            _by_block(torch.Tensor.mul_, w[rows], grid, rows, block)
    return out


def encode_fp8(
    w: Tensor,  # (..., out, in) float32
    block: tuple[int, int],
    scale: Tensor | None = None,  # as for decode_fp8; None: from the amax of each block
    rule: Fp8Rule = "divide",
    scale_dtype: torch.dtype = torch.float32,
    draws: Draws | None = None,
) -> Scaled:  # codes (..., out, in) float8_e4m3fn, scale (..., ceil(out/h), ceil(in/w))
    """code = w / scale.

    - divide (compressed-tensors): scale = amax / 448 rounded to `scale_dtype`; for zeros its eps.
    - multiply (transformers' fp8): f = 448 / amax, scale = 1 / f, code = w · f; for zeros 1.
      With a scale as argument f = 1 / scale.
    - power (transformers' fp8 with scale_fmt ue8m0): that scale, raised to a power of 2.

    A scale of 0 as argument holds zeros, whatever w. Raises ValueError where a scale is to be
    computed from values that are not finite.
    """
    factor = None
    if scale is None:
        scale, factor = _fp8_scale(block_amax(w, block), rule, scale_dtype)
    grid = _grid(scale_as_float(scale), w.shape, block)
    factors = None
    if rule == "multiply" and factor is not None:
        factors = _grid(factor, w.shape, block)
    elif rule == "multiply":
        factors = torch.where(grid == 0, 1.0, grid).reciprocal()
    codes = torch.empty(w.shape, dtype=torch.float8_e4m3fn, device=w.device)
    for number, (x, code) in enumerate(matrices(w.contiguous(), codes)):
        each = None if factors is None else factors[number]
        for rows in pieces(*x.shape):
            nearest = _nearest(x[rows], grid[number], each, rows, block)
            if draws is not None:
                position = (number * len(x) + rows.start) * x.shape[1]
                near = _neighbors(x[rows], nearest, grid[number], rows, block)
                magnitude = near.draw(draws.at(position)).to(torch.uint8)
                nearest = (nearest.view(torch.uint8) & 0x80 | magnitude).view(codes.dtype)
            code[rows] = nearest
    return Scaled(codes, scale)


def column_rounder(
    scale: Tensor,  # as for decode_fp8
    block: tuple[int, int],
    shape: tuple[int, int],  # (out, in)
    rule: Fp8Rule = "divide",
) -> RoundColumn:
    """To nearest with these scales, as `encode_fp8`."""
    grid = _grid(scale_as_float(scale), torch.Size(shape), block)[0]
    numbers = torch.arange(shape[0], device=grid.device) // block[0]
    table = _values(torch.float8_e4m3fn, grid.device)

    def round_column(w: Tensor, column: int) -> Tensor:
        each = grid[numbers, column // block[1]]
        factor = torch.where(each == 0, 1.0, each)
        scaled = w * factor.reciprocal() if rule == "multiply" else w / factor
        codes = scaled.clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
        return table[codes.view(torch.uint8).int()].mul_(each)

    return round_column


def requantize_fp8(
    w: Tensor,  # (..., out, in) float32
    block: tuple[int, int],
    scale: Tensor,  # as for decode_fp8, as stored
    draws: Draws,
    rule: Fp8Rule = "divide",
) -> Scaled:
    """Codes drawn with the stored scales, so that values that do not change keep their codes.

    A block with a value beyond its largest code gets a new scale where that makes the expected
    squared error smaller.
    """
    grid, amax = _grid(scale_as_float(scale), w.shape, block), block_amax(w, block)
    beyond = amax.view(grid.shape) > FP8_MAX * grid.abs()
    if bool(beyond.any()):
        dtype = torch.float8_e8m0fnu if scale.dtype == torch.uint8 else scale.dtype
        new = _fp8_scale(amax, rule, dtype)[0].float().view(grid.shape)
        better = _expected_errors(w, block, new) < _expected_errors(w, block, grid)
        chosen = torch.where(beyond & better, new, grid)
        scale = chosen.to(dtype).view(scale.dtype).view(scale.shape)
    return encode_fp8(w, block, scale, rule, draws=draws)


def _nearest(
    x: Tensor, grid: Tensor, factors: Tensor | None, rows: slice, block: tuple[int, int]
) -> Tensor:
    """The nearest codes, of x divided by the scales or multiplied by factors."""
    if factors is None:
        scaled = _by_block(torch.div, x, torch.where(grid == 0, 1.0, grid), rows, block)
    else:
        scaled = _by_block(torch.mul, x, factors, rows, block)
    # without the clamp older torch converts what is above to NaN
    return scaled.clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def _neighbors(
    x: Tensor, codes: Tensor, grid: Tensor, rows: slice, block: tuple[int, int]
) -> Neighbors:
    """Of magnitudes: 0x7E is the largest, 0x7F NaN."""
    table, size = _values(codes.dtype, x.device), grid.abs()
    value = lambda level: _by_block(torch.mul, table[level], size, rows, block)
    return neighbors(x.abs(), codes.view(torch.uint8) & 0x7F, value, (0, 0x7E))


def _expected_errors(w: Tensor, block: tuple[int, int], grid: Tensor) -> Tensor:
    """The expected squared error of each block whose codes are drawn."""
    total = torch.zeros_like(grid)
    for x, each, out in matrices(w.contiguous(), grid, total):
        for rows in pieces(*x.shape):
            codes = _nearest(x[rows], each, None, rows, block)
            error = _neighbors(x[rows], codes, each, rows, block).expected_error()
            error = pad(error, (0, -error.shape[1] % block[1])).view(len(error), -1, block[1])
            index = torch.arange(rows.start, rows.stop, device=w.device) // block[0]
            out.index_add_(0, index, error.sum(2))
    return total


def _fp8_scale(amax: Tensor, rule: Fp8Rule, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The scale that is stored and the factor that "multiply" uses."""
    check_finite(amax)
    if rule == "divide":
        scale = (amax / FP8_MAX).to(dtype)
        scale = torch.where(scale == 0, torch.finfo(dtype).eps, scale)
        return scale, scale.float().reciprocal()
    limits = torch.finfo(torch.float32)
    factor = torch.where(amax > 0, FP8_MAX / amax, 1.0).clamp(max=limits.max)
    scale = factor.reciprocal()
    if rule == "power":
        scale = torch.exp2(scale.clamp(min=limits.tiny).log2().ceil())
    return scale.to(dtype), factor


def _grid(scale: Tensor, shape: torch.Size, block: tuple[int, int]) -> Tensor:
    """The scales of all blocks of a weight of this shape: (matrices, ceil(out/h), ceil(in/w))."""
    grid = (*shape[:-2], math.ceil(shape[-2] / block[0]), math.ceil(shape[-1] / block[1]))
    if scale.numel() > 1 and scale.shape != grid:
        raise ValueError(
            f"expected scales {grid} for a weight {tuple(shape)} in blocks {block}, "
            f"not {tuple(scale.shape)}"
        )
    if scale.numel() > 1:
        return scale.reshape(-1, *grid[-2:])
    return scale.reshape(1, 1, 1).expand(math.prod(grid[:-2]), *grid[-2:])


def _by_block(
    apply: Callable[[Tensor, Tensor], Tensor],
    w: Tensor,
    grid: Tensor,
    rows: slice,
    block: tuple[int, int],
) -> Tensor:
    """apply(w, scale of each element), for these rows of the weight."""
    height, width = block
    numbers = torch.arange(rows.start, rows.stop, device=grid.device) // height
    scale = grid[numbers]  # (n, ceil(in/w))
    whole = w.shape[1] // width
    if whole * width == w.shape[1]:
        return apply(w.view(len(w), whole, width), scale[:, :, None]).view(w.shape)
    return apply(w, scale.repeat_interleave(width, 1)[:, : w.shape[1]])


@functools.cache
def _values(dtype: torch.dtype, device: torch.device) -> Tensor:  # (256,) float32
    """The value of each byte: faster than torch's own conversion from E4M3."""
    return torch.arange(256, dtype=torch.uint8).view(dtype).float().to(device)

"""FP8 with scales, to float32 and back.

Decoding is code · scale in float32, rounded once. Encoding with the stored scales gives the codes
back for every code (-0 and NaN included) whose product with its scale stays within float32; scales
computed again may differ for the same values. Codes are rounded to nearest, ties to even, or with
`draws` stochastically, and saturate.

A weight is whole rows. A range of rows can be encoded alone if it begins with a block.
"""

import functools
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from adapterkit.kernels.quant.grid import (
    Encoded,
    Grid,
    block_amax,
    check_finite,
    chosen,
    loses_less,
    matrices,
    scale_as_float,
)
from adapterkit.kernels.quant.stochastic import Draws

FP8_MAX = 448.0  # of E4M3
# the largest magnitude of each kind of codes; above it are NaN, and of E5M2 the infinity
ENDS = {torch.float8_e4m3fn: (0, 0x7E), torch.float8_e5m2: (0, 0x7B)}

Fp8Rule = Literal["divide", "multiply", "power"]


@dataclass(frozen=True, kw_only=True)
class Fp8Grid(Grid):
    """code · scale; values are multiplied by a second scale, or else divided by the first."""

    ends: tuple[int, int] = (0, 0x7E)  # 0x7F is NaN
    dtype: torch.dtype = torch.float8_e4m3fn
    sign = 0x80
    refuses = False

    def scaled(self, x: Tensor, *scales: Tensor) -> Tensor:
        return x * scales[1] if len(scales) == 2 else super().scaled(x, *scales)

    def nearest(self, x: Tensor) -> Tensor:
        # without the clamp older torch converts what is above to NaN
        largest = torch.finfo(self.dtype).max
        return x.clamp_(-largest, largest).to(self.dtype).view(torch.uint8)

    def level(self, code: Tensor) -> Tensor:
        return _values(self.dtype, code.device)[code.int()]


def grids(
    scale: Tensor,  # as for decode_fp8
    shape: tuple[int, ...],  # (..., out, in)
    block: tuple[int, int],
    rule: Fp8Rule = "divide",
    factor: Tensor | None = None,  # of "multiply", where it is not 1 / scale
    dtype: torch.dtype = torch.float8_e4m3fn,  # of codes
) -> list[Fp8Grid]:
    """The grids of the matrices of a weight."""
    scales, ends = _by_block(scale_as_float(scale), shape, block), ENDS[dtype]
    if rule != "multiply":
        return [Fp8Grid(scales=(one,), block=block, ends=ends, dtype=dtype) for one in scales]
    if factor is None:
        factors = torch.where(scales == 0, 1.0, scales).reciprocal()
    else:
        factors = _by_block(factor, shape, block)
    pairs = zip(scales, factors, strict=True)
    return [Fp8Grid(scales=pair, block=block, ends=ends, dtype=dtype) for pair in pairs]


def decode_fp8(
    codes: Tensor,  # (..., out, in) float8_e4m3fn, float8_e5m2, ...
    # (..., ceil(out/h), ceil(in/w)), or of rows (..., out), any float or uint8 (E8M0); or one value
    scale: Tensor,
    block: tuple[int, int],  # (h, w): (128, 128), per channel (1, in), per tensor (out, in)
) -> Tensor:  # (..., out, in) float32
    """code · scale.

    transformers (fp8) does just this and rounds to the weight's dtype. compressed-tensors computes
    in the scale's dtype: for a bf16 or fp16 scale, rounding to that gives its result, since the
    product of the two is exact in float32.
    """
    out = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    table = _values(codes.dtype, codes.device)
    stored = matrices(codes.contiguous().view(torch.uint8), out)
    for (code, w), grid in zip(stored, grids(scale, codes.shape, block), strict=True):

        def look_up(rows: slice, x: Tensor, code: Tensor = code) -> None:
            torch.index_select(table, 0, code[rows].flatten().int(), out=x.view(-1))

        grid.decode(w, look_up)
    return out


def encode_fp8(
    w: Tensor,  # (..., out, in) float32
    block: tuple[int, int],
    scale: Tensor | None = None,  # as for decode_fp8; None: from the amax of each block
    rule: Fp8Rule = "divide",
    scale_dtype: torch.dtype = torch.float32,
    draws: Draws | None = None,
    dtype: torch.dtype = torch.float8_e4m3fn,  # of codes, or float8_e5m2
) -> Encoded:  # codes (..., out, in), scale (..., ceil(out/h), ceil(in/w))
    """code = w / scale.

    - divide (compressed-tensors): scale = amax / 448 rounded to `scale_dtype`; for zeros its eps.
      E5M2 has 57344 instead of 448.
    - multiply (transformers' fp8): f = 448 / amax, scale = 1 / f, code = w · f; for zeros 1.
      With a scale as argument f = 1 / scale.
    - power (transformers' fp8 with scale_fmt ue8m0): that scale, raised to a power of 2.

    A scale of 0 as argument holds zeros, whatever w. Raises ValueError if a scale would be computed
    from values that are not finite.
    """
    factor = None
    if scale is None:
        scale, factor = _fp8_scale(block_amax(w, block), rule, scale_dtype, dtype)
    codes = torch.empty(w.shape, dtype=dtype, device=w.device)
    stored = matrices(w.contiguous(), codes.view(torch.uint8))
    for number, grid in enumerate(grids(scale, w.shape, block, rule, factor, dtype)):
        x, target = next(stored)
        here = None if draws is None else draws.at(number * x.numel())
        grid.encoded(x, target, here)
    return Encoded(codes, scale)


def requantize_fp8(
    w: Tensor,  # (..., out, in) float32
    block: tuple[int, int],
    scale: Tensor | None,  # as for decode_fp8, as stored
    draws: Draws | None,
    rule: Fp8Rule = "divide",
    dtype: torch.dtype = torch.float8_e4m3fn,  # of codes
    new_dtype: torch.dtype = torch.float32,  # of new scales
) -> Encoded:
    """Sample codes with the stored scales, or new ones if `loses_less`; without scales or draws,
    the nearest with new ones."""
    if scale is None or draws is None:
        return encode_fp8(w, block, rule=rule, scale_dtype=new_dtype, dtype=dtype)
    scale_dtype = torch.float8_e8m0fnu if scale.dtype == torch.uint8 else scale.dtype
    new, _ = _fp8_scale(block_amax(w, block), rule, scale_dtype, dtype)
    both = zip(*(grids(each, w.shape, block, dtype=dtype) for each in (scale, new)), strict=True)
    weights = (x for (x,) in matrices(w.contiguous()))
    better = torch.stack([loses_less(x, *pair) for x, pair in zip(weights, both, strict=True)])
    new = new.view(scale.dtype).view(scale.shape)
    scale = chosen(better.view(scale.shape), new, scale)
    return encode_fp8(w, block, scale, rule, draws=draws, dtype=dtype)


def _fp8_scale(
    amax: Tensor, rule: Fp8Rule, dtype: torch.dtype, codes: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The stored scale and the factor that "multiply" uses."""
    check_finite(amax)
    largest = torch.finfo(codes).max
    if rule == "divide":
        scale = (amax / largest).to(dtype)
        scale = torch.where(scale == 0, torch.finfo(dtype).eps, scale)
        return scale, scale.float().reciprocal()
    limits = torch.finfo(torch.float32)
    factor = torch.where(amax > 0, largest / amax, 1.0).clamp(max=limits.max)
    scale = factor.reciprocal()
    if rule == "power":
        scale = torch.exp2(scale.clamp(min=limits.tiny).log2().ceil())
    return scale.to(dtype), factor


def _by_block(scale: Tensor, shape: tuple[int, ...], block: tuple[int, int]) -> Tensor:
    """The scales of all blocks of a weight of this shape: (matrices, ceil(out/h), ceil(in/w)). With
    blocks of whole rows the last axis may be missing."""
    grid = (*shape[:-2], math.ceil(shape[-2] / block[0]), math.ceil(shape[-1] / block[1]))
    of_rows = grid[-1] == 1 and scale.shape == grid[:-1]
    if scale.numel() > 1 and scale.shape != grid and not of_rows:
        raise ValueError(
            f"expected scales {grid} for a weight {tuple(shape)} in blocks {block}, "
            f"not {tuple(scale.shape)}"
        )
    if scale.numel() > 1:
        return scale.reshape(-1, *grid[-2:])
    return scale.reshape(1, 1, 1).expand(math.prod(grid[:-2]), *grid[-2:])


@functools.cache
def _values(dtype: torch.dtype, device: torch.device) -> Tensor:  # (256,) float32
    """The value of each byte; faster than torch's own conversion from E4M3."""
    return torch.arange(256, dtype=torch.uint8).view(dtype).float().to(device)

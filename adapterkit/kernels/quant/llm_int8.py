"""LLM.int8 of bitsandbytes: int8 with a scale for each row, to float32 and back.

Encoding gives the bytes of bitsandbytes 0.50 on a CPU, which transformers stores. CUDA divides 127
by the scale less exactly: a code may be one off. Values that are not finite raise ValueError.

Reference: Dettmers et al. 2022, arXiv:2208.07339.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from adapterkit.kernels.quant.grid import Encoded, Grid, check_finite, loses_less, pieces
from adapterkit.kernels.quant.stochastic import Draws
from adapterkit.kernels.sums import all_finite, are_finite

NOT_FINITE = "the matrix holds values that are not finite in float16"


@dataclass(frozen=True, kw_only=True)
class Int8Grid(Grid):
    """code · scale · (1/127), by rows; values are multiplied by the second scale."""

    ends: tuple[int, int] = (-127, 127)
    refuses = False  # quantize_int8 does, of float16
    large = True

    def scaled(self, x: Tensor, *scales: Tensor) -> Tensor:
        return x * scales[1]

    def multiplied(self, level: Tensor, *scales: Tensor) -> Tensor:
        return level.mul_(scales[0]).mul_(1 / 127)

    def round_column(self, w: Tensor, number: int | None) -> Tensor:
        """Round by way of float16, as `quantize_int8`."""
        largest = torch.finfo(torch.float16).max
        return super().round_column(w.clamp(-largest, largest).half().float(), number)


def _factor(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 0.0, 127.0 / scale)


def grid_of(
    scale: Tensor,  # (out,) float32: SCB
    width: int,
) -> Int8Grid:
    scale = scale.float()[:, None]
    return Int8Grid(scales=(scale, _factor(scale)), block=(1, width))


def quantize_int8(
    weight: Tensor,  # (out, in), any float dtype
    scale: Tensor | None = None,  # (out,) float32: SCB; None: the amax of each row
    draws: Draws | None = None,  # only with a scale
) -> Encoded:  # codes (out, in) int8, scale (out,) float32
    """scale = amax of a row, code = w · (127 / scale) to nearest, ties to even; w is rounded to
    float16 first, as LLM.int8 does. With draws w is not, and codes are rounded stochastically.

    Magnitudes from 65520 on are infinite in float16 and so refused; bitsandbytes stores zeros for
    their rows. A scale of 0 encodes zeros. Scales and codes of decode_int8 come back if a row has a
    code of ±127, which is so for scales computed from values above float16's subnormals.
    """
    w = weight.detach()
    if scale is not None:
        check_finite(scale, problem="the scales hold values that are not finite")
    scales = torch.empty(len(w), device=w.device) if scale is None else scale.float()
    codes = torch.empty(w.shape, dtype=torch.int8, device=w.device)
    sums: list[Tensor] = []
    for rows in pieces(w.shape, w.device, large=True):
        x = w[rows].float() if draws is not None else w[rows].half().float()
        if scale is None:
            scales[rows] = x.abs().amax(1)
            codes[rows] = x.mul_(_factor(scales[rows][:, None])).round_()
            continue
        sums.append(x.sum())
        here = None if draws is None else draws.at(rows.start * w.shape[1])
        grid_of(scales[rows], w.shape[1]).encoded(x, codes[rows], here)
    check_finite(scales, problem=NOT_FINITE)
    if not are_finite(sums) and not all_finite(w if draws is not None else w.half()):
        raise ValueError(NOT_FINITE)
    return Encoded(codes, scales)


def requantize_int8(
    weight: Tensor,  # (out, in) float32
    scale: Tensor | None,  # (out,) float32, as stored
    draws: Draws | None,
) -> Encoded:
    """Sample codes with the stored scales, or new ones if `loses_less`; without scales or draws,
    the nearest with new ones."""
    if scale is None or draws is None:
        return quantize_int8(weight)
    amax, width = weight.abs().amax(1), weight.shape[1]
    better = loses_less(weight, grid_of(scale, width), grid_of(amax, width))
    return quantize_int8(weight, torch.where(better[:, 0], amax, scale), draws)


def decode_int8(
    codes: Tensor,  # (out, in) int8
    scale: Tensor,  # (out,) float32: SCB
) -> Tensor:  # (out, in) float32
    """code · scale · (1/127), two roundings, as bitsandbytes' int8_vectorwise_dequant; any rows of
    codes and scales."""
    out = torch.empty(codes.shape, device=codes.device)
    return grid_of(scale, codes.shape[1]).decode(out, lambda rows, x: x.copy_(codes[rows]))

"""LLM.int8 of bitsandbytes: int8 with a scale for each row, to float32 and back.

Encoding gives the bytes of bitsandbytes 0.50 on a CPU, which transformers stores. CUDA divides 127
by the scale less exactly: a code may be one off. Values that are not finite raise ValueError.

Reference: Dettmers et al. 2022, arXiv:2208.07339.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from adapterkit.kernels.blockwise import PIECE, check_scales
from adapterkit.kernels.common import RoundColumn
from adapterkit.kernels.stochastic import Draws, Neighbors, neighbors


class Int8Rows(NamedTuple):
    codes: Tensor  # (out, in) int8
    scale: Tensor  # (out,) float32: SCB


def quantize_int8(
    weight: Tensor,  # (out, in), any float dtype
    scale: Tensor | None = None,  # (out,) float32: SCB; None: the amax of each row
    draws: Draws | None = None,  # only beside a scale
) -> Int8Rows:
    """scale = amax of a row, code = w · (127 / scale) to nearest, ties to even; w is rounded to
    float16 first, as LLM.int8 does. With draws w is not, and codes are rounded stochastically.

    Magnitudes from 65520 on are infinite in float16 and so refused; bitsandbytes stores zeros for
    their rows. A scale of 0 holds zeros. Scales and codes of decode_int8 come back where a row has
    a code of ±127, as all have whose scales were computed so from values above float16's
    subnormals.
    """
    w = weight.detach()
    check_scales(scale)
    scales = torch.empty(len(w), device=w.device) if scale is None else scale.float()
    codes = torch.empty(w.shape, dtype=torch.int8, device=w.device)
    for rows in _row_pieces(w):
        x = w[rows].float() if draws is not None else w[rows].half().float()
        if scale is None:
            scales[rows] = x.abs().amax(1)
        if not bool((scales[rows] if scale is None else x).isfinite().all()):
            raise ValueError("the matrix holds values that are not finite in float16")
        if draws is None:
            codes[rows] = _nearest(x, scales[rows], saturate=scale is not None)
        else:
            near = _neighbors(x, scales[rows])
            codes[rows] = near.draw(draws.at(rows.start * w.shape[1]))
    return Int8Rows(codes, scales)


def requantize_int8(
    weight: Tensor,  # (out, in) float32
    scale: Tensor,  # (out,) float32, as stored
    draws: Draws,
) -> Int8Rows:
    """Codes drawn with the stored scales, so that values that do not change keep their codes.

    A row with a value beyond its largest code gets a new scale where that makes the expected
    squared error smaller.
    """
    amax = weight.abs().amax(1)
    for row in (amax > scale.abs()).nonzero().flatten().tolist():
        x, both = weight[row].expand(2, -1), torch.stack([scale[row], amax[row]])
        old, new = _neighbors(x, both).expected_error().sum(1)
        if bool(new < old):
            index = torch.tensor([row], device=scale.device)
            scale = scale.index_fill(0, index, float(amax[row]))
    return quantize_int8(weight, scale, draws)


def column_rounder(
    scale: Tensor,  # (out,) float32: SCB
) -> RoundColumn:
    """To nearest with these scales, by way of float16 as `quantize_int8`."""
    largest = torch.finfo(torch.float16).max

    def round_column(w: Tensor, column: int) -> Tensor:
        x = w.clamp(-largest, largest).half().float()[:, None]
        return _nearest(x, scale, saturate=True)[:, 0].mul_(scale).mul_(1 / 127)

    return round_column


def decode_int8(
    codes: Tensor,  # (out, in) int8
    scale: Tensor,  # (out,) float32: SCB
) -> Tensor:  # (out, in) float32
    """code · scale · (1/127), two roundings, as bitsandbytes' int8_vectorwise_dequant; any rows of
    both."""
    out = torch.empty(codes.shape, device=codes.device)
    for rows in _row_pieces(codes):
        out[rows] = codes[rows]
        out[rows].mul_(scale[rows].float()[:, None]).mul_(1 / 127)
    return out


def _row_pieces(w: Tensor) -> list[slice]:
    step = max(1, PIECE // max(1, w.shape[1]))
    return [slice(first, first + step) for first in range(0, len(w), step)]


def _nearest(
    x: Tensor,  # (n, in) float32, overwritten
    scale: Tensor,  # (n,)
    saturate: bool,
) -> Tensor:
    factor = torch.where(scale == 0, 0.0, 127.0 / scale)
    x.mul_(factor[:, None]).round_()
    return x.clamp_(-127, 127) if saturate else x


def _neighbors(x: Tensor, scale: Tensor) -> Neighbors:
    value = lambda level: level.float().mul_(scale[:, None]).mul_(1 / 127)
    level = _nearest(x.clone(), scale, saturate=True)
    return neighbors(x, level, value, (-127, 127), (scale < 0)[:, None])

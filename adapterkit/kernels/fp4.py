"""FP4 with scales of groups, MXFP4 and NVFP4, to float32 and back.

Decoding is code · scale in float32, rounded once. Encoding with the stored scales gives the codes
back for every code (-0 included) whose product with its scale stays within float32; scales
computed anew may differ for the same values. Codes are rounded to nearest, ties to even, or with
`draws` stochastically, and saturate.

A weight is whole rows: any part of its rows can be encoded alone.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from adapterkit.kernels.common import (
    RoundColumn,
    Scaled,
    block_amax,
    check_finite,
    expand_nibbles,
    nibble_pairs,
    pack_nibbles,
    pieces,
    scale_as_float,
)
from adapterkit.kernels.fp8 import FP8_MAX
from adapterkit.kernels.stochastic import Draws, Neighbors, neighbors

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # codes 0 to 7; 8 to 15 are their negatives
FP4_MAX = 6.0
MX_GROUP, NV_GROUP = 32, 16  # values with one scale

MxRule = Literal["floor", "even", "up"]


# MXFP4


def decode_mxfp4(
    blocks: Tensor,  # (..., groups, 16) uint8, the first of two values in the low nibble
    scales: Tensor,  # (..., groups) uint8, E8M0
) -> Tensor:  # (..., groups · 32) float32
    """code · 2^(scale - 127); scale 255 is NaN (OCP MX 1.0, 5.4.1), 0 is the subnormal 2^-127.

    transformers does this in the weight's dtype, which gives the same rounded to it but for scale
    255: an infinity there.
    """
    _check_sizes(blocks, scales, MX_GROUP // 2)
    return _decode(blocks, scale_as_float(scales)).view(*scales.shape[:-1], -1)


def encode_mxfp4(
    w: Tensor,  # (..., groups · 32) float32
    scales: Tensor | None = None,  # (..., groups) uint8; None: from the amax of each group
    rule: MxRule = "floor",
    draws: Draws | None = None,
) -> Scaled:  # codes (..., groups, 16) uint8, scale (..., groups) uint8
    """code = w / 2^(scale - 127).

    With 2^e ≤ amax < 2^(e+1) the scale is
    - floor (OCP MX 1.0, 6.3, and torchao): 2^(e-2), so that what is above 1.5 · 2^e saturates;
    - even (compressed-tensors): 2^(e-1) from amax = 1.75 · 2^e on, else 2^(e-2);
    - up (triton_kernels, so transformers): the least 2^k ≥ amax / 6, so that nothing saturates.

    Zeros get scale 0, groups with a NaN or an infinity 255, all codes 0. The values of decode_mxfp4
    come back under every rule; the scale does where the largest code is 4 or 6, not 0 to 3.
    """
    groups = w.unflatten(-1, (-1, MX_GROUP))
    scales = _mx_scale(_group_amax(groups), rule) if scales is None else scales
    return Scaled(_encode(groups, scale_as_float(scales), draws), scales)


def requantize_mxfp4(w: Tensor, scales: Tensor, rule: MxRule, draws: Draws) -> Scaled:
    """Codes drawn with the stored scales, as in `fp8.requantize_fp8`."""
    groups = w.unflatten(-1, (-1, MX_GROUP))
    new = _mx_scale(_group_amax(groups), rule)
    better = _better(groups, scale_as_float(scales), scale_as_float(new))
    return encode_mxfp4(w, torch.where(better, new, scales), draws=draws)


def mxfp4_rounder(
    scales: Tensor,  # (out, groups) uint8
) -> RoundColumn:
    """To nearest with these scales, as `encode_mxfp4`."""
    return _rounder(scale_as_float(scales), MX_GROUP)


def _mx_scale(amax: Tensor, rule: MxRule) -> Tensor:
    """Biased exponents: a float32's own bias is E8M0's."""
    amax = amax / FP4_MAX if rule == "up" else amax
    bits = amax.view(torch.int32)
    exponent = (bits + {"floor": 0, "even": 1 << 21, "up": (1 << 23) - 1}[rule]) >> 23
    exponent = (exponent - (0 if rule == "up" else 2)).clamp_(0, 254)
    return torch.where(amax.isfinite(), exponent, 255).to(torch.uint8)


# NVFP4


def decode_nvfp4(
    packed: Tensor,  # (..., in/2) uint8, the first of two values in the low nibble
    scale: Tensor,  # (..., in/16) float8_e4m3fn
    *,
    divisor: Tensor | None = None,  # one value: compressed-tensors' weight_global_scale
    factor: Tensor | None = None,  # one value: modelopt's weight_scale_2
) -> Tensor:  # (..., in) float32
    """code · (scale / divisor), or code · (scale · factor), each operation in float32.

    compressed-tensors does just this and rounds to bf16.
    """
    _check_sizes(packed, scale, NV_GROUP // 2)
    return _decode(packed, _group_scale(scale, divisor, factor)).view(*packed.shape[:-1], -1)


def encode_nvfp4(
    w: Tensor,  # (..., in) float32
    *,
    divisor: Tensor | None = None,  # nvfp4_divisor of the whole weight, or
    factor: Tensor | None = None,  # nvfp4_factor of it: one of the two
    scale: Tensor | None = None,  # (..., in/16) float8_e4m3fn; None: from the amax of each group
    draws: Draws | None = None,
) -> Scaled:  # codes (..., in/2) uint8, scale (..., in/16) float8_e4m3fn
    """code = w / (scale / divisor) with scale = amax / 6 · divisor, or w / (scale · factor) with
    scale = amax / (6 · factor).

    A computed scale of 0 becomes what the tools write for zeros: 0.125 beside a divisor, 1 beside a
    factor (2^-9 where amax is not 0, which they lose). compressed-tensors writes code 0 for -0, not
    8. Raises ValueError where a scale is to be computed from values that are not finite.
    """
    groups = w.unflatten(-1, (-1, NV_GROUP))
    if scale is None:
        scale = _nv_scale(_group_amax(groups), divisor, factor)
    codes = _encode(groups, _group_scale(scale, divisor, factor), draws)
    return Scaled(codes.flatten(-2), scale)


class NvFp4(NamedTuple):
    codes: Tensor
    scale: Tensor
    tensor_scale: Tensor  # the divisor or the factor


def requantize_nvfp4(
    w: Tensor,  # (..., in) float32
    scale: Tensor,  # (..., in/16) float8_e4m3fn
    draws: Draws,
    *,
    divisor: Tensor | None = None,
    factor: Tensor | None = None,
) -> NvFp4:
    """Codes drawn with the stored scales, as in `fp8.requantize_fp8`; by the same rule the scale of
    the whole weight is computed anew, and all others with it, where a group needs more than it
    allows."""
    old = divisor if factor is None else factor
    if old is None or (divisor is not None and factor is not None):
        raise TypeError("expected a divisor or a factor")

    def group_scale(scale: Tensor, tensor_scale: Tensor) -> Tensor:
        if factor is None:
            return _group_scale(scale, tensor_scale, None)
        return _group_scale(scale, None, tensor_scale)

    def new_scale(tensor_scale: Tensor) -> Tensor:
        if factor is None:
            return _nv_scale(amax, tensor_scale, None)
        return _nv_scale(amax, None, tensor_scale)

    def error(scale: Tensor, tensor_scale: Tensor) -> Tensor:
        return _expected_errors(groups, group_scale(scale, tensor_scale)).sum()

    groups = w.unflatten(-1, (-1, NV_GROUP))
    amax, chosen = _group_amax(groups), old
    new = new_scale(old)
    better = _better(groups, group_scale(scale, old), group_scale(new, old))
    scale = torch.where(better, new.float(), scale.float()).to(scale.dtype)
    if bool((amax > FP4_MAX * FP8_MAX * group_scale(scale.new_ones(()), old).abs()).any()):
        wider = (nvfp4_divisor if factor is None else nvfp4_factor)(amax.amax()).view(old.shape)
        new = new_scale(wider)
        if bool(error(new, wider) < error(scale, old)):
            scale, chosen = new, wider
    codes = _encode(groups, group_scale(scale, chosen), draws).flatten(-2)
    return NvFp4(codes, scale, chosen)


def nvfp4_rounder(
    scale: Tensor,  # (out, in/16) float8_e4m3fn
    *,
    divisor: Tensor | None = None,
    factor: Tensor | None = None,
) -> RoundColumn:
    """To nearest with these scales, as `encode_nvfp4`."""
    return _rounder(_group_scale(scale, divisor, factor), NV_GROUP)


def nvfp4_divisor(amax: Tensor) -> Tensor:  # (1,) float32
    """448 · 6 / amax of a weight, so that the scale of its largest group is 448; 1 where that
    overflows."""
    amax = amax.float().clamp(min=torch.finfo(torch.float32).tiny).reshape(1)
    divisor = FP8_MAX * FP4_MAX / amax
    return torch.where(divisor.isfinite(), divisor, 1.0)


def nvfp4_factor(amax: Tensor) -> Tensor:  # () float32
    """amax of a weight / (6 · 448); 1 for zeros."""
    factor = amax.float().reshape(()) / (FP4_MAX * FP8_MAX)
    return torch.where(factor > 0, factor, 1.0)


def _nv_scale(amax: Tensor, divisor: Tensor | None, factor: Tensor | None) -> Tensor:
    check_finite(amax)
    if divisor is not None:
        scale = (amax / FP4_MAX * divisor).clamp_(max=FP8_MAX).to(torch.float8_e4m3fn).float()
        return torch.where(scale == 0, 0.125, scale).to(torch.float8_e4m3fn)
    assert factor is not None
    scale = (amax / (FP4_MAX * factor)).clamp_(2.0**-9, FP8_MAX)
    return torch.where(amax == 0, 1.0, scale).to(torch.float8_e4m3fn)


def _group_scale(scale: Tensor, divisor: Tensor | None, factor: Tensor | None) -> Tensor:
    """What each code of a group is multiplied by, float32."""
    if divisor is not None and factor is None:
        return scale.float() / divisor
    if factor is not None and divisor is None:
        return scale.float() * factor
    raise TypeError("expected a divisor or a factor")


# Shared by both.


def _group_amax(
    groups: Tensor,  # (..., groups, n)
) -> Tensor:  # (..., groups)
    width = groups.shape[-1]
    return block_amax(groups.reshape(-1, width), (1, width)).view(groups.shape[:-1])


def _decode(
    packed: Tensor,  # n/2 bytes for each scale
    scale: Tensor,  # float32
) -> Tensor:  # (scales, n) float32
    packed, scale = packed.reshape(scale.numel(), -1), scale.reshape(-1, 1)
    out = torch.empty(len(packed), 2 * packed.shape[1], device=packed.device)
    table = nibble_pairs((*E2M1, *(-x for x in E2M1)), packed.device)
    for rows in pieces(*out.shape):
        expand_nibbles(packed[rows], table, out[rows])
        out[rows].mul_(scale[rows])
    return out


def _encode(
    groups: Tensor,  # (..., n) float32
    scale: Tensor,  # (...) float32
    draws: Draws | None = None,
) -> Tensor:  # (..., n/2) uint8
    w, scale = groups.reshape(-1, groups.shape[-1]).contiguous(), scale.reshape(-1, 1)
    packed = torch.empty(len(w), w.shape[1] // 2, dtype=torch.uint8, device=w.device)
    for rows in pieces(*w.shape):
        codes = _nearest(w[rows], scale[rows])
        if draws is not None:
            near = _neighbors(w[rows], codes, scale[rows])
            codes = near.draw(draws.at(rows.start * w.shape[1])).bitwise_or_(codes & 8)
        packed[rows] = pack_nibbles(codes)
    return packed.view(*groups.shape[:-1], -1)


def _rounder(
    scale: Tensor,  # (out, groups) float32
    size: int,
) -> RoundColumn:
    table = torch.tensor((*E2M1, *(-x for x in E2M1)), device=scale.device)

    def round_column(w: Tensor, column: int) -> Tensor:
        each = scale[:, column // size]
        return table[_nearest(w, each)].mul_(each)

    return round_column


def _nearest(w: Tensor, scale: Tensor) -> Tensor:
    return _e2m1(w / torch.where(scale == 0, 1.0, scale))


def _neighbors(w: Tensor, codes: Tensor, scale: Tensor) -> Neighbors:
    """Of magnitudes."""
    table, size = torch.tensor(E2M1, device=w.device), scale.abs()
    return neighbors(w.abs(), codes & 7, lambda level: table[level] * size, (0, 7))


def _better(groups: Tensor, scale: Tensor, new: Tensor) -> Tensor:
    """Which groups hold a value beyond their largest code and have a smaller expected error with
    the new scale."""
    beyond = _group_amax(groups) > FP4_MAX * scale.abs()
    if not bool(beyond.any()):
        return beyond
    return beyond & (_expected_errors(groups, new) < _expected_errors(groups, scale))


def _expected_errors(groups: Tensor, scale: Tensor) -> Tensor:
    """The expected squared error of each group whose codes are drawn."""
    w, each = groups.reshape(-1, groups.shape[-1]), scale.reshape(-1, 1)
    total = torch.empty(len(w), device=w.device)
    for rows in pieces(*w.shape):
        near = _neighbors(w[rows], _nearest(w[rows], each[rows]), each[rows])
        total[rows] = near.expected_error().sum(1)
    return total.view(scale.shape)


def _e2m1(
    x: Tensor,  # float32, overwritten
) -> Tensor:  # int32
    """Codes, rounded to nearest, ties to even; NaN is 0."""
    x.nan_to_num_(0.0, FP4_MAX, -FP4_MAX)
    sign = (x.view(torch.int32) >> 28).bitwise_and_(8)
    x.abs_().clamp_(max=FP4_MAX)
    # 2^22 times the power of 2 below x has half of that power as its last place; 1 and more for
    # the subnormals
    last = (x.view(torch.int32) & 0x7F800000).view(torch.float32).clamp_(min=1.0).mul_(2.0**22)
    x.add_(last).sub_(last)
    # exponent and first bit of the mantissa are the code from 1 on; 0.5 is one short of its code
    return (x.view(torch.int32) >> 22).sub_(252).add_(x == 0.5).clamp_(min=0).bitwise_or_(sign)


def _check_sizes(packed: Tensor, scale: Tensor, each: int) -> None:
    if packed.numel() != scale.numel() * each:
        raise ValueError(
            f"expected {each} bytes for each scale, not {tuple(packed.shape)} and "
            f"{tuple(scale.shape)}"
        )

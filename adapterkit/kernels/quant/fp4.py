"""FP4 with scales of groups, MXFP4 and NVFP4, to float32 and back.

Decoding is code · scale in float32, rounded once. Encoding with the stored scales gives the codes
back for every code (-0 included) whose product with its scale stays within float32; scales
computed again may differ for the same values. Codes are rounded to nearest, ties to even, or with
`draws` stochastically, and saturate.

A weight is whole rows: any part of its rows can be encoded alone.
"""

import functools
from dataclasses import dataclass
from typing import Literal, NamedTuple, Self

import torch
from torch import Tensor

from adapterkit.kernels.quant.fp8 import FP8_MAX
from adapterkit.kernels.quant.grid import (
    MX_GROUP,
    NV_GROUP,
    Encoded,
    Grid,
    block_amax,
    check_finite,
    chosen,
    loses_less,
    scale_as_float,
)
from adapterkit.kernels.quant.integers import expand_nibbles, nibble_pairs, pack_nibbles
from adapterkit.kernels.quant.stochastic import Draws

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # codes 0 to 7; 8 to 15 are their negatives
FP4_MAX = 6.0

MxRule = Literal["floor", "even", "up"]


@dataclass(frozen=True, kw_only=True)
class Fp4Grid(Grid):
    """code · scale, of groups."""

    ends: tuple[int, int] = (0, 7)
    sign = 8
    refuses = False

    def nearest(self, x: Tensor) -> Tensor:
        return _e2m1(x)

    def level(self, code: Tensor) -> Tensor:
        return _values(code.device)[code]


def mxfp4_grid(
    scales: Tensor,  # (..., groups) uint8
) -> Fp4Grid:
    return _grid(scale_as_float(scales), MX_GROUP)


def nvfp4_grid(
    scale: Tensor,  # (..., in/16) float8_e4m3fn
    tensor_scale: "TensorScale",
) -> Fp4Grid:
    return _grid(tensor_scale.of_groups(scale), NV_GROUP)


# MXFP4


def decode_mxfp4(
    blocks: Tensor,  # (..., groups, 16) uint8, the first of two values in the low nibble
    scales: Tensor,  # (..., groups) uint8, E8M0
) -> Tensor:  # (..., groups · 32) float32
    """code · 2^(scale - 127); scale 255 is NaN (OCP MX 1.0, 5.4.1), 0 is the subnormal 2^-127.

    transformers does this in the weight's dtype, which gives the same rounded to it, except that
    scale 255 is an infinity there.
    """
    _check_sizes(blocks, scales, MX_GROUP // 2)
    return _decode(blocks, mxfp4_grid(scales)).view(*scales.shape[:-1], -1)


def encode_mxfp4(
    w: Tensor,  # (..., groups · 32) float32
    scales: Tensor | None = None,  # (..., groups) uint8; None: from the amax of each group
    rule: MxRule = "floor",
    draws: Draws | None = None,
) -> Encoded:  # codes (..., groups, 16) uint8, scale (..., groups) uint8
    """code = w / 2^(scale - 127).

    With 2^e ≤ amax < 2^(e+1) the scale is
    - floor (OCP MX 1.0, 6.3, and torchao): 2^(e-2), so that values above 1.5 · 2^e saturates;
    - even (compressed-tensors): 2^(e-1) from amax = 1.75 · 2^e on, else 2^(e-2);
    - up (triton_kernels, so transformers): the least 2^k ≥ amax / 6, so that nothing saturates.

    Zeros get scale 0, groups with a NaN or an infinity 255, all codes 0. The values of decode_mxfp4
    come back under every rule; the scale does where the largest code is 4 or 6, not 0 to 3.
    """
    if scales is None:
        scales = _mx_scale(_group_amax(w, MX_GROUP), rule)
    codes = _encode(w, mxfp4_grid(scales), draws)
    return Encoded(codes.view(*scales.shape, -1), scales)


def requantize_mxfp4(
    w: Tensor, scales: Tensor | None, rule: MxRule, draws: Draws | None
) -> Encoded:
    """Sample codes with the stored scales, or new ones if `loses_less`; without scales or draws,
    the nearest with new ones."""
    if scales is None or draws is None:
        return encode_mxfp4(w, rule=rule)
    scales = scales.view(torch.uint8)
    new = _mx_scale(_group_amax(w, MX_GROUP), rule)
    better = loses_less(_matrix(w), mxfp4_grid(scales), mxfp4_grid(new))
    return encode_mxfp4(w, chosen(better.view(scales.shape), new, scales), draws=draws)


def _mx_scale(amax: Tensor, rule: MxRule) -> Tensor:
    """Biased exponents; float32 and E8M0 have the same bias."""
    amax = amax / FP4_MAX if rule == "up" else amax
    bits = amax.view(torch.int32)
    exponent = (bits + {"floor": 0, "even": 1 << 21, "up": (1 << 23) - 1}[rule]) >> 23
    exponent = (exponent - (0 if rule == "up" else 2)).clamp_(0, 254)
    return torch.where(amax.isfinite(), exponent, 255).to(torch.uint8)


# NVFP4


class TensorScale(NamedTuple):
    """One value for a weight: compressed-tensors divides the scales of groups by it
    (`weight_global_scale`), modelopt multiplies them by it (`weight_scale_2`)."""

    value: Tensor  # float32
    divides: bool

    @classmethod
    def fitting(cls, amax: Tensor, divides: bool) -> Self:
        """448 · 6 / amax of the weight, so that the largest group's scale is 448, or 1 if that
        overflows; multiplied: amax / (6 · 448), 1 for zeros."""
        if divides:
            amax = amax.float().clamp(min=torch.finfo(torch.float32).tiny).reshape(1)
            value = FP8_MAX * FP4_MAX / amax
            return cls(torch.where(value.isfinite(), value, 1.0), divides)
        value = amax.float().reshape(()) / (FP4_MAX * FP8_MAX)
        return cls(torch.where(value > 0, value, 1.0), divides)

    @classmethod
    def kept(cls, old: "TensorScale | None", amax: Tensor, divides: bool) -> "TensorScale":
        """The old scale, which fused layers share, while the weight's largest value fits with a
        margin for rounding; otherwise a fitting one."""
        largest = FP4_MAX * FP8_MAX * (1 + 2.0**-20)
        if old is not None:
            value = float(old.value)
            exceeds = float(amax) * value > largest if divides else float(amax) > largest * value
            if not exceeds:
                return old
        return cls.fitting(amax, divides)

    def of_groups(self, scale: Tensor) -> Tensor:
        """The factor of each code of a group, float32."""
        return scale.float() / self.value if self.divides else scale.float() * self.value

    def scale_for(self, amax: Tensor) -> Tensor:
        """The scales of groups from their largest values. For zeros as the tools write: 0.125 or 1;
        a scale that rounds to 0 is replaced likewise, or by at least 2^-9."""
        check_finite(amax)
        if self.divides:
            scale = (amax / FP4_MAX * self.value).clamp_(max=FP8_MAX)
            scale = scale.to(torch.float8_e4m3fn).float()
            return torch.where(scale == 0, 0.125, scale).to(torch.float8_e4m3fn)
        scale = (amax / (FP4_MAX * self.value)).clamp_(2.0**-9, FP8_MAX)
        return torch.where(amax == 0, 1.0, scale).to(torch.float8_e4m3fn)


class NvFp4(NamedTuple):
    codes: Tensor  # (..., in/2) uint8
    scale: Tensor  # (..., in/16) float8_e4m3fn
    tensor_scale: TensorScale


def decode_nvfp4(
    packed: Tensor,  # (..., in/2) uint8, the first of two values in the low nibble
    scale: Tensor,  # (..., in/16) float8_e4m3fn
    tensor_scale: TensorScale,
) -> Tensor:  # (..., in) float32
    """code · (scale / divisor), or code · (scale · factor), each operation in float32.

    compressed-tensors does just this and rounds to bf16.
    """
    _check_sizes(packed, scale, NV_GROUP // 2)
    return _decode(packed, nvfp4_grid(scale, tensor_scale)).view(*packed.shape[:-1], -1)


def encode_nvfp4(
    w: Tensor,  # (..., in) float32
    tensor_scale: TensorScale,
    scale: Tensor | None = None,  # (..., in/16) float8_e4m3fn; None: from the amax of each group
    draws: Draws | None = None,
) -> NvFp4:
    """code = w / (scale / divisor) with scale = amax / 6 · divisor, or w / (scale · factor) with
    scale = amax / (6 · factor).

    compressed-tensors writes code 0 for -0, not 8. Raises ValueError if a scale would be computed
    from values that are not finite.
    """
    if scale is None:
        scale = tensor_scale.scale_for(_group_amax(w, NV_GROUP))
    return NvFp4(_encode(w, nvfp4_grid(scale, tensor_scale), draws), scale, tensor_scale)


def requantize_nvfp4(
    w: Tensor,  # (..., in) float32
    scale: Tensor,  # (..., in/16) float8_e4m3fn
    tensor_scale: TensorScale,
    draws: Draws,
) -> NvFp4:
    """Sample codes with the stored scales, or new ones if `loses_less`; if a group needs more than
    the weight's global scale allows, that scale and all others are computed again."""
    x, amax = _matrix(w), _group_amax(w, NV_GROUP)
    old, new = nvfp4_grid(scale, tensor_scale), tensor_scale.scale_for(amax)
    better = loses_less(x, old, nvfp4_grid(new, tensor_scale))
    scale = chosen(better.view(scale.shape), new, scale)
    one = torch.ones((), device=scale.device)
    largest = FP4_MAX * FP8_MAX * tensor_scale.of_groups(one).abs()
    if bool((amax > largest).any()):
        wider = TensorScale.fitting(amax.amax(), tensor_scale.divides)
        wider = wider._replace(value=wider.value.view(tensor_scale.value.shape))
        error = lambda scale, by: nvfp4_grid(scale, by).errors(x).sum()
        new = wider.scale_for(amax)
        if bool(error(new, wider) < error(scale, tensor_scale)):
            scale, tensor_scale = new, wider
    return encode_nvfp4(w, tensor_scale, scale, draws)


# Shared by both.


def renew_nvfp4(
    w: Tensor,  # (..., in) float32
    old: tuple[Tensor, TensorScale] | None,  # scales as stored
    draws: Draws | None,
    *,
    divides: bool,
) -> NvFp4:
    """Encode, sampled with the old scales or to nearest with new ones; the global scale stays while
    its largest value fits."""
    if old is not None and draws is not None:
        return requantize_nvfp4(w, *old, draws)
    amax = _group_amax(w, NV_GROUP)
    tensor_scale = TensorScale.kept(old and old[1], amax.amax(), divides)
    return encode_nvfp4(w, tensor_scale, tensor_scale.scale_for(amax))


def _grid(scale: Tensor, size: int) -> Fp4Grid:
    return Fp4Grid(scales=(scale.reshape(-1, scale.shape[-1]),), block=(1, size))


def _matrix(w: Tensor) -> Tensor:
    return w.reshape(-1, w.shape[-1]).contiguous()


def _group_amax(
    w: Tensor,  # (..., in)
    size: int,
) -> Tensor:  # (..., groups)
    return block_amax(_matrix(w), (1, size)).view(*w.shape[:-1], -1)


def _decode(
    packed: Tensor,  # n/2 bytes for each scale
    grid: Fp4Grid,
) -> Tensor:  # (rows, in) float32
    packed = packed.reshape(len(grid.scales[0]), -1)
    out = torch.empty(len(packed), 2 * packed.shape[1], device=packed.device)
    table = nibble_pairs((*E2M1, *(-x for x in E2M1)), packed.device)
    return grid.decode(out, lambda rows, x: expand_nibbles(packed[rows], table, x))


def _encode(w: Tensor, grid: Fp4Grid, draws: Draws | None) -> Tensor:  # (..., in/2) uint8
    packed = torch.empty(*w.shape[:-1], w.shape[-1] // 2, dtype=torch.uint8, device=w.device)
    target = packed.view(-1, packed.shape[-1])
    for rows, codes in grid.encode(_matrix(w), draws):
        target[rows] = pack_nibbles(codes)
    return packed


@functools.cache
def _values(device: torch.device) -> Tensor:  # (16,) float32
    return torch.tensor((*E2M1, *(-x for x in E2M1))).to(device)


@functools.cache
def _thresholds(device: torch.device) -> Tensor:  # (7,) float32, rising
    """The middles of magnitudes; those that round up are a little lower."""
    values = torch.tensor(E2M1)
    middles = (values[:-1] + values[1:]) / 2
    middles[1::2] = torch.nextafter(middles[1::2], torch.tensor(0.0))
    return middles.to(device)


def _e2m1(
    x: Tensor,  # float32, overwritten
) -> Tensor:  # int32
    """Codes, rounded to nearest, ties to even; NaN is 0."""
    x.nan_to_num_(0.0, FP4_MAX, -FP4_MAX)
    sign = (x.view(torch.int32) >> 28).bitwise_and_(8)
    x.abs_()
    if x.device.type != "cpu":
        return torch.bucketize(x, _thresholds(x.device), out_int32=True).bitwise_or_(sign)
    round_magnitudes(x)
    # exponent and first bit of the mantissa are the code from 1 on; 0.5 is one short of its code
    return (x.view(torch.int32) >> 22).sub_(252).add_(x == 0.5).clamp_(min=0).bitwise_or_(sign)


def round_magnitudes(x: Tensor) -> Tensor:
    """The nearest values of FP4 of float32 magnitudes, in their memory."""
    x.clamp_(max=FP4_MAX)
    # 2^22 times the power of 2 below x has half of that power as its last place; 1 and more for
    # the subnormals
    last = (x.view(torch.int32) & 0x7F800000).view(torch.float32).clamp_(min=1.0).mul_(2.0**22)
    return x.add_(last).sub_(last)


def _check_sizes(packed: Tensor, scale: Tensor, each: int) -> None:
    if packed.numel() != scale.numel() * each:
        raise ValueError(
            f"expected {each} bytes for each scale, not {tuple(packed.shape)} and "
            f"{tuple(scale.shape)}"
        )

"""What narrow floats hold: FP8 with scales, MXFP4 and NVFP4, to float32 and back.

Decoding is code times scale in float32, rounded once. Encoding with the scales that are stored gives the codes back for every
code (FP4 and FP8, -0 and FP8's NaN included) whose product with its scale does not leave float32's range; scales made anew may
be others for the same values. Codes round to nearest, ties to even, or with `draws` stochastically, and saturate.

Weights are whole rows, so that parts of them can be worked on alone; of FP8, parts that begin with a block.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from adapterkit.kernels.stochastic import Between, Draws, between

PIECE = 1 << 16  # elements worked on at once, so that a few temporaries of them stay in cache
E2M1 = (
    0.0,
    0.5,
    1.0,
    1.5,
    2.0,
    3.0,
    4.0,
    6.0,
)  # codes 0 to 7; 8 to 15 are their negatives, 8 being -0
FP4_MAX, FP8_MAX = 6.0, 448.0
MX, NV = 32, 16  # values with one scale

Fp8Rule = Literal["divide", "multiply", "power"]
MxRule = Literal["floor", "even", "up"]


class Scaled(NamedTuple):
    codes: Tensor
    scale: Tensor


# FP8


def decode_fp8(
    codes: Tensor,  # (..., out, in) float8_e4m3fn, float8_e5m2, ...
    scale: Tensor,  # (..., ceil(out/h), ceil(in/w)) any float, or uint8 as the exponents of E8M0; one value serves all
    block: tuple[int, int],  # (h, w): (128, 128), per channel (1, in), per tensor (out, in)
) -> Tensor:  # (..., out, in) float32
    """code · scale.

    transformers (fp8) does just this and rounds to the weight's dtype. compressed-tensors does it in the scale's dtype: with a bf16
    or fp16 scale, rounding to that gives its result, since the product of the two is exact in float32.
    """
    out = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    table = _values(codes.dtype, codes.device)
    for code, grid, w in _matrices(
        codes.contiguous().view(torch.uint8), _grid(as_float(scale), codes.shape, block), out
    ):
        for rows in pieces(*w.shape):
            torch.index_select(table, 0, code[rows].flatten().int(), out=w[rows].view(-1))
            _by_block(torch.Tensor.mul_, w[rows], grid, rows, block)
    return out


def encode_fp8(
    w: Tensor,  # (..., out, in) float32
    block: tuple[int, int],
    scale: Tensor
    | None = None,  # as for decode_fp8; made from the largest magnitude of each block if not given
    rule: Fp8Rule = "divide",
    scale_dtype: torch.dtype = torch.float32,
    draws: Draws | None = None,
) -> Scaled:  # codes (..., out, in) float8_e4m3fn, scale (..., ceil(out/h), ceil(in/w))
    """code = w / scale.

    - divide (compressed-tensors): scale = amax / 448 rounded to `scale_dtype`; for zeros its eps.
    - multiply (transformers' fp8): f = 448 / amax, scale = 1 / f, code = w · f; for zeros 1. With a given scale f = 1 / scale.
    - power (transformers' fp8 with scale_fmt ue8m0): that scale, raised to a power of 2.

    A given scale of 0 holds zeros, whatever w. Raises ValueError if a scale is to be made from values that are not finite.
    """
    factor = None
    if scale is None:
        scale, factor = _fp8_scale(block_largest(w, block), rule, scale_dtype)
    grid = _grid(as_float(scale), w.shape, block)
    if rule == "multiply":
        factors = (
            _grid(factor, w.shape, block)
            if factor is not None
            else torch.where(grid == 0, 1.0, grid).reciprocal()
        )
    else:
        factors = None
    codes = torch.empty(w.shape, dtype=torch.float8_e4m3fn, device=w.device)
    for number, (x, code) in enumerate(_matrices(w.contiguous(), codes)):
        for rows in pieces(*x.shape):
            nearest = _fp8_codes(
                x[rows], grid[number], None if factors is None else factors[number], rows, block
            )
            if draws is not None:
                drawn = _between_fp8(x[rows], nearest, grid[number], rows, block).drawn(
                    draws.at((number * len(x) + rows.start) * x.shape[1])
                )
                nearest = (nearest.view(torch.uint8) & 0x80 | drawn.to(torch.uint8)).view(
                    codes.dtype
                )
            code[rows] = nearest
    return Scaled(codes, scale)


def renew_fp8(
    w: Tensor,  # (..., out, in) float32
    block: tuple[int, int],
    scale: Tensor,  # as for decode_fp8, as it is stored
    draws: Draws,
    rule: Fp8Rule = "divide",
) -> Scaled:
    """Codes drawn beside the scales that are there, so that values that do not move keep theirs. A block with a value beyond its
    largest code gets a new scale if that makes the expected square of the error smaller."""
    grid, largest = _grid(as_float(scale), w.shape, block), block_largest(w, block)
    beyond = largest.view(grid.shape) > FP8_MAX * grid.abs()
    if bool(beyond.any()):
        kind = torch.float8_e8m0fnu if scale.dtype == torch.uint8 else scale.dtype
        fresh = _fp8_scale(largest, rule, kind)[0].float().view(grid.shape)
        better = _fp8_spread(w, block, fresh) < _fp8_spread(w, block, grid)
        scale = (
            torch.where(beyond & better, fresh, grid).to(kind).view(scale.dtype).view(scale.shape)
        )
    return encode_fp8(w, block, scale, rule, draws=draws)


def _fp8_codes(
    x: Tensor, grid: Tensor, factors: Tensor | None, rows: slice, block: tuple[int, int]
) -> Tensor:
    """The nearest codes, of x divided by the scales or multiplied by factors."""
    if factors is None:
        scaled = _by_block(torch.div, x, torch.where(grid == 0, 1.0, grid), rows, block)
    else:
        scaled = _by_block(torch.mul, x, factors, rows, block)
    return scaled.clamp_(-FP8_MAX, FP8_MAX).to(
        torch.float8_e4m3fn
    )  # older torch converts what is above to NaN


def _between_fp8(
    x: Tensor, codes: Tensor, grid: Tensor, rows: slice, block: tuple[int, int]
) -> Between:
    """Of magnitudes: 0x7E is the largest, 0x7F NaN."""
    table, size = _values(codes.dtype, x.device), grid.abs()
    value = lambda level: _by_block(torch.mul, table[level], size, rows, block)
    return between(x.abs(), codes.view(torch.uint8) & 0x7F, value, (0, 0x7E))


def _fp8_spread(w: Tensor, block: tuple[int, int], grid: Tensor) -> Tensor:
    """The expected squared error of each block."""
    total = torch.zeros_like(grid)
    for x, each, out in _matrices(w.contiguous(), grid, total):
        for rows in pieces(*x.shape):
            found = _between_fp8(
                x[rows], _fp8_codes(x[rows], each, None, rows, block), each, rows, block
            ).spread()
            found = (
                pad(found, (0, -found.shape[1] % block[1])).view(len(found), -1, block[1]).sum(2)
            )
            out.index_add_(
                0, torch.arange(rows.start, rows.stop, device=w.device) // block[0], found
            )
    return total


def block_largest(
    w: Tensor,  # (..., out, in)
    block: tuple[int, int],
) -> Tensor:  # (..., ceil(out/h), ceil(in/w))
    """The largest magnitude of each block, NaN where it holds one."""
    (height, width), (out, columns) = block, w.shape[-2:]
    found = w.new_empty(*w.shape[:-2], math.ceil(out / height), math.ceil(columns / width))
    for x, most in _matrices(w.contiguous(), found):
        for up in pieces(len(most), height * columns):
            rows = x[up.start * height : up.stop * height]
            rows = pad(rows, (0, -columns % width, 0, -len(rows) % height))
            rows = rows.view(-1, height, rows.shape[1])
            high = (
                torch.maximum(rows.amax(1), rows.amin(1).neg_())
                if height > 1
                else rows.abs().squeeze(1)
            )
            most[up] = high.abs_().view(len(high), -1, width).amax(2)
    return found


def _fp8_scale(largest: Tensor, rule: Fp8Rule, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The scale that is stored and the factor that "multiply" uses."""
    _check_finite(largest)
    if rule == "divide":
        scale = (largest / FP8_MAX).to(dtype)
        scale = torch.where(scale == 0, torch.finfo(dtype).eps, scale)
        return scale, scale.float().reciprocal()
    factor = torch.where(largest > 0, FP8_MAX / largest, 1.0).clamp(
        max=torch.finfo(torch.float32).max
    )
    scale = factor.reciprocal()
    if rule == "power":
        scale = torch.exp2(scale.clamp(min=torch.finfo(torch.float32).tiny).log2().ceil())
    return scale.to(dtype), factor


def _grid(scale: Tensor, shape: torch.Size, block: tuple[int, int]) -> Tensor:
    """Scales of all blocks of a weight of this shape."""
    grid = (*shape[:-2], math.ceil(shape[-2] / block[0]), math.ceil(shape[-1] / block[1]))
    if scale.numel() > 1 and scale.shape != grid:
        raise ValueError(
            f"expected scales {grid} for a weight {tuple(shape)} in blocks {block}, not {tuple(scale.shape)}"
        )
    return (
        scale.reshape(-1, *grid[-2:])
        if scale.numel() > 1
        else scale.reshape(1, 1, 1).expand(math.prod(grid[:-2]), *grid[-2:])
    )


def _by_block(
    apply: Callable[[Tensor, Tensor], Tensor],
    w: Tensor,
    grid: Tensor,
    rows: slice,
    block: tuple[int, int],
) -> Tensor:
    """apply(w, scale of each element), for these rows of the weight."""
    height, width = block
    scale = grid[
        torch.arange(rows.start, rows.stop, device=grid.device) // height
    ]  # (n, ceil(in/w))
    whole = w.shape[1] // width
    if whole * width == w.shape[1]:
        return apply(w.view(len(w), whole, width), scale[:, :, None]).view(w.shape)
    return apply(w, scale.repeat_interleave(width, 1)[:, : w.shape[1]])


# FP4


def decode_mxfp4(
    blocks: Tensor,  # (..., groups, 16) uint8, the first of two values in the low nibble
    scales: Tensor,  # (..., groups) uint8, E8M0
) -> Tensor:  # (..., groups · 32) float32
    """code · 2^(scale - 127); scale 255 is NaN (OCP MX 1.0, 5.4.1), 0 is the subnormal 2^-127.

    transformers does this in the weight's dtype, which gives the same rounded to it but for scale 255: an infinity there.
    """
    _check_sizes(blocks, scales, MX // 2)
    return _decoded_fp4(blocks, as_float(scales)).view(*scales.shape[:-1], -1)


def encode_mxfp4(
    w: Tensor,  # (..., groups · 32) float32
    scales: Tensor
    | None = None,  # (..., groups) uint8; made from the largest magnitude of each group if not given
    rule: MxRule = "floor",
    draws: Draws | None = None,
) -> Scaled:  # codes (..., groups, 16) uint8, scale (..., groups) uint8
    """code = w / 2^(scale - 127).

    With 2^e ≤ amax < 2^(e+1) the scale is
    - floor (OCP MX 1.0, 6.3, and torchao): 2^(e-2), so that what is above 1.5 · 2^e saturates;
    - even (compressed-tensors): 2^(e-1) from amax = 1.75 · 2^e on, else 2^(e-2);
    - up (triton_kernels, so transformers): the least 2^k ≥ amax / 6, so that nothing saturates.

    Zeros get scale 0, groups with a NaN or an infinity 255, all codes 0. The values of decode_mxfp4 come back under every rule; the
    scale does where the largest code is 4 or 6, not 0 to 3.
    """
    groups = w.unflatten(-1, (-1, MX))
    scales = _mx_scale(_group_largest(groups), rule) if scales is None else scales
    return Scaled(_encoded_fp4(groups, as_float(scales), draws), scales)


def renew_mxfp4(w: Tensor, scales: Tensor, rule: MxRule, draws: Draws) -> Scaled:
    """Codes drawn beside the scales that are there, as in renew_fp8."""
    groups = w.unflatten(-1, (-1, MX))
    fresh = _mx_scale(_group_largest(groups), rule)
    scales = torch.where(_better_fp4(groups, as_float(scales), as_float(fresh)), fresh, scales)
    return encode_mxfp4(w, scales, draws=draws)


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
    _check_sizes(packed, scale, NV // 2)
    return _decoded_fp4(packed, _local(scale, divisor, factor)).view(*packed.shape[:-1], -1)


def encode_nvfp4(
    w: Tensor,  # (..., in) float32
    *,
    divisor: Tensor
    | None = None,  # as for decode_nvfp4: nvfp4_divisor or nvfp4_factor of the whole weight
    factor: Tensor | None = None,
    scale: Tensor
    | None = None,  # (..., in/16) float8_e4m3fn; made from the largest magnitude of each group if not given
    draws: Draws | None = None,
) -> Scaled:  # codes (..., in/2) uint8, scale (..., in/16) float8_e4m3fn
    """code = w / (scale / divisor) with scale = amax / 6 · divisor, or w / (scale · factor) with amax / (6 · factor).

    A scale that would be 0 becomes what the tools write for zeros: 0.125 beside a divisor, 1 beside a factor (2^-9 where
    amax is not 0, which they lose). compressed-tensors writes code 0 for -0, not 8.
    """
    groups = w.unflatten(-1, (-1, NV))
    if scale is None:
        scale = _nv_scale(_group_largest(groups), divisor, factor)
    return Scaled(_encoded_fp4(groups, _local(scale, divisor, factor), draws).flatten(-2), scale)


class Renewed(NamedTuple):
    codes: Tensor
    scale: Tensor
    whole: Tensor  # the divisor or the factor


def renew_nvfp4(
    w: Tensor,  # (..., in) float32
    scale: Tensor,  # (..., in/16) float8_e4m3fn
    draws: Draws,
    *,
    divisor: Tensor | None = None,
    factor: Tensor | None = None,
) -> Renewed:
    """Codes drawn beside the scales that are there, as in renew_fp8; by the same rule the scale of the whole weight is a new one,
    and all others with it, where a group needs more than it allows."""
    groups = w.unflatten(-1, (-1, NV))
    largest, whole = (
        _group_largest(groups),
        {"divisor": divisor} if factor is None else {"factor": factor},
    )
    fresh = _nv_scale(largest, divisor, factor)
    better = _better_fp4(groups, _local(scale, divisor, factor), _local(fresh, divisor, factor))
    scale = torch.where(better, fresh.float(), scale.float()).to(scale.dtype)
    if bool(
        (largest > FP4_MAX * FP8_MAX * _local(scale.new_ones(()), divisor, factor).abs()).any()
    ):
        (name, old), make = (
            next(iter(whole.items())),
            nvfp4_divisor if factor is None else nvfp4_factor,
        )
        assert old is not None
        new = {name: make(largest.amax()).view(old.shape)}
        fresh = _nv_scale(largest, new.get("divisor"), new.get("factor"))
        lost = lambda scale, whole: _fp4_spread(
            groups, _local(scale, whole.get("divisor"), whole.get("factor"))
        ).sum()
        if bool(lost(fresh, new) < lost(scale, whole)):
            scale, whole = fresh, new
    made = encode_nvfp4(
        w, divisor=whole.get("divisor"), factor=whole.get("factor"), scale=scale, draws=draws
    )
    found = next(iter(whole.values()))
    assert found is not None
    return Renewed(made.codes, made.scale, found)


def nvfp4_divisor(largest: Tensor) -> Tensor:  # (1,) float32
    """448 · 6 / the largest magnitude of a weight, so that the largest group's scale is 448; 1 where that overflows."""
    divisor = (
        FP8_MAX * FP4_MAX / largest.float().clamp(min=torch.finfo(torch.float32).tiny).reshape(1)
    )
    return torch.where(divisor.isfinite(), divisor, 1.0)


def nvfp4_factor(largest: Tensor) -> Tensor:  # () float32
    """The largest magnitude of a weight / (6 · 448); 1 for zeros."""
    factor = largest.float().reshape(()) / (FP4_MAX * FP8_MAX)
    return torch.where(factor > 0, factor, 1.0)


def _mx_scale(largest: Tensor, rule: MxRule) -> Tensor:
    """Biased exponents: a float32's own bias is E8M0's."""
    largest = largest / FP4_MAX if rule == "up" else largest
    bits = largest.view(torch.int32)
    exponent = (bits + {"floor": 0, "even": 1 << 21, "up": (1 << 23) - 1}[rule]) >> 23
    exponent = (exponent - (0 if rule == "up" else 2)).clamp_(0, 254)
    return torch.where(largest.isfinite(), exponent, 255).to(torch.uint8)


def _nv_scale(largest: Tensor, divisor: Tensor | None, factor: Tensor | None) -> Tensor:
    _check_finite(largest)
    if divisor is not None:
        scale = (largest / FP4_MAX * divisor).clamp_(max=FP8_MAX).to(torch.float8_e4m3fn).float()
        return torch.where(scale == 0, 0.125, scale).to(torch.float8_e4m3fn)
    assert factor is not None
    scale = (largest / (FP4_MAX * factor)).clamp_(2.0**-9, FP8_MAX)
    return torch.where(largest == 0, 1.0, scale).to(torch.float8_e4m3fn)


def _local(scale: Tensor, divisor: Tensor | None, factor: Tensor | None) -> Tensor:
    if divisor is not None and factor is None:
        return scale.float() / divisor
    if factor is not None and divisor is None:
        return scale.float() * factor
    raise TypeError("expected a divisor or a factor")


def _group_largest(
    groups: Tensor,  # (..., groups, n)
) -> Tensor:  # (..., groups)
    return block_largest(groups.reshape(-1, groups.shape[-1]), (1, groups.shape[-1])).view(
        groups.shape[:-1]
    )


def _decoded_fp4(
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


def _encoded_fp4(
    groups: Tensor,  # (..., n) float32
    scale: Tensor,  # (...) float32
    draws: Draws | None = None,
) -> Tensor:  # (..., n/2) uint8
    w, scale = groups.reshape(-1, groups.shape[-1]).contiguous(), scale.reshape(-1, 1)
    packed = torch.empty(len(w), w.shape[1] // 2, dtype=torch.uint8, device=w.device)
    for rows in pieces(*w.shape):
        codes = _fp4_codes(w[rows], scale[rows])
        if draws is not None:
            drawn = _between_fp4(w[rows], codes, scale[rows]).drawn(
                draws.at(rows.start * w.shape[1])
            )
            codes = drawn.bitwise_or_(codes & 8)
        packed[rows] = pack_nibbles(codes)
    return packed.view(*groups.shape[:-1], -1)


def _fp4_codes(w: Tensor, scale: Tensor) -> Tensor:
    """The nearest ones."""
    return _e2m1(w / torch.where(scale == 0, 1.0, scale))


def _between_fp4(w: Tensor, codes: Tensor, scale: Tensor) -> Between:
    """Of magnitudes."""
    table, size = torch.tensor(E2M1, device=w.device), scale.abs()
    return between(w.abs(), codes & 7, lambda level: table[level] * size, (0, 7))


def _better_fp4(groups: Tensor, scale: Tensor, fresh: Tensor) -> Tensor:
    """Which groups hold a value beyond their largest code and are expected to lose less beside a fresh scale."""
    beyond = _group_largest(groups) > FP4_MAX * scale.abs()
    if not bool(beyond.any()):
        return beyond
    return beyond & (_fp4_spread(groups, fresh) < _fp4_spread(groups, scale))


def _fp4_spread(groups: Tensor, scale: Tensor) -> Tensor:
    """The expected squared error of each group."""
    w, each = groups.reshape(-1, groups.shape[-1]), scale.reshape(-1, 1)
    total = torch.empty(len(w), device=w.device)
    for rows in pieces(*w.shape):
        total[rows] = (
            _between_fp4(w[rows], _fp4_codes(w[rows], each[rows]), each[rows]).spread().sum(1)
        )
    return total.view(scale.shape)


def _e2m1(
    x: Tensor,  # float32, used up
) -> Tensor:  # int32
    """Codes, rounded to nearest, ties to even; NaN is 0."""
    x.nan_to_num_(0.0, FP4_MAX, -FP4_MAX)
    sign = (x.view(torch.int32) >> 28).bitwise_and_(8)
    x.abs_().clamp_(max=FP4_MAX)
    # 2^22 times the power of 2 below x has half of that power as its last place; 1 and more for the subnormals
    last = (x.view(torch.int32) & 0x7F800000).view(torch.float32).clamp_(min=1.0).mul_(2.0**22)
    x.add_(last).sub_(last)
    # exponent and first bit of the mantissa are the code from 1 on; 0.5 is one short of its
    return (x.view(torch.int32) >> 22).sub_(252).add_(x == 0.5).clamp_(min=0).bitwise_or_(sign)


# shared


def as_float(scale: Tensor) -> Tensor:
    """float32; uint8 is E8M0."""
    return (scale.view(torch.float8_e8m0fnu) if scale.dtype == torch.uint8 else scale).float()


@functools.cache
def nibble_pairs(values: tuple[float, ...], device: torch.device) -> Tensor:  # (256,) int32
    """For each byte the values of its low and its high nibble, two float16 in one int32."""
    half = torch.tensor(values, dtype=torch.float16)
    return (
        torch.stack([half.repeat(16), half.repeat_interleave(16)], 1)
        .view(torch.int32)
        .flatten()
        .to(device)
    )


def expand_nibbles(
    packed: Tensor,  # (n, m) uint8
    table: Tensor,
    out: Tensor,  # (n, 2m) float32, takes the result
) -> None:
    """Values of nibbles, the low one first. A table of float16 pairs is read as fast as one of single values is for bytes."""
    out.copy_(
        torch.index_select(table, 0, packed.flatten().int()).view(torch.float16).view(out.shape)
    )


def pack_nibbles(
    codes: Tensor,  # (n, 2m) of 0 to 15
) -> Tensor:  # (n, m) uint8
    pairs = codes.to(torch.uint8, memory_format=torch.contiguous_format).view(
        torch.int16
    )  # high << 8 | low
    return (pairs | pairs >> 4).to(torch.uint8)


@functools.cache
def _values(dtype: torch.dtype, device: torch.device) -> Tensor:  # (256,) float32
    """The value of each byte. Faster than torch's own conversion from E4M3."""
    return torch.arange(256, dtype=torch.uint8).view(dtype).float().to(device)


def _matrices(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The last two axes of each."""
    return zip(*(t.reshape(-1, *t.shape[-2:]) for t in tensors), strict=True)


def pieces(rows: int, columns: int) -> Iterator[slice]:
    """Slices of rows with about PIECE elements."""
    step = max(1, PIECE // max(1, columns))
    return (slice(first, min(first + step, rows)) for first in range(0, rows, step))


def _check_finite(largest: Tensor) -> None:
    if not bool(largest.isfinite().all()):
        raise ValueError("the matrix holds values that are not finite")


def _check_sizes(packed: Tensor, scale: Tensor, each: int) -> None:
    if packed.numel() != scale.numel() * each:
        raise ValueError(
            f"expected {each} bytes for each scale, not {tuple(packed.shape)} and {tuple(scale.shape)}"
        )

"""FP8, MXFP4 and NVFP4: every code, the formats' own tools, and plain arithmetic in float64."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from adapterkit.kernels.quant import fp4, fp8, grid
from adapterkit.kernels.quant.fp4 import (
    E2M1,
    TensorScale,
    decode_mxfp4,
    decode_nvfp4,
    encode_mxfp4,
    encode_nvfp4,
)
from adapterkit.kernels.quant.fp8 import decode_fp8, encode_fp8
from adapterkit.kernels.quant.grid import block_amax
from tests.support import format_tools

pytestmark = pytest.mark.quick

CODES = torch.arange(256, dtype=torch.uint8)
FP4 = torch.tensor([*E2M1, *(-x for x in E2M1)], dtype=torch.float64)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid, "PIECE", 200)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, all NaN being one."""
    a, b = (
        torch.where(t.isnan(), math.nan, t) if t.is_floating_point() and t.element_size() > 1 else t
        for t in (a, b)
    )
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
    )


def agree(
    ours: Tensor, tensors: dict[str, Tensor], key: str, dtype: torch.dtype = torch.float32
) -> None:
    """`ours`, rounded, is what the tool read."""
    expected = tensors[key]
    assert same(
        format_tools.digest(ours.to(dtype)) if len(tensors["w"]) == 16 else ours.to(dtype), expected
    )


# FP8


def fp8_values(codes: Tensor) -> Tensor:
    """E4M3 by its definition: float64 of bytes."""
    bits = codes.view(torch.uint8).to(torch.int64)
    exponent, mantissa = (bits >> 3) & 15, (bits & 7).double()
    value = torch.where(
        exponent > 0, (1 + mantissa / 8) * 2.0 ** (exponent - 7), mantissa * 2.0**-9
    )
    value = torch.where((bits & 127) == 127, math.nan, value)
    return torch.where(bits > 127, -value, value)


def expanded(scale: Tensor, block: tuple[int, int], shape: torch.Size) -> Tensor:
    return scale.repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)[
        ..., : shape[-2], : shape[-1]
    ]


BLOCKS = [
    ((5, 7), (128, 128)),
    ((1, 300), (128, 128)),
    ((130, 257), (128, 128)),
    ((9, 64), (1, 64)),
    ((9, 64), (9, 64)),
    ((8, 64), (1, 16)),
    ((2, 3, 6, 10), (4, 4)),
]


@pytest.mark.parametrize(("shape", "block"), BLOCKS)
def test_fp8_is_code_times_scale(shape: tuple[int, ...], block: tuple[int, int]) -> None:
    w = gaussian(*shape) * gaussian(*shape[:-1], 1).exp()
    codes, scale = encode_fp8(w, block)
    assert scale.shape == (
        *shape[:-2],
        math.ceil(shape[-2] / block[0]),
        math.ceil(shape[-1] / block[1]),
    )
    each = expanded(scale, block, w.shape).double()
    assert same(decode_fp8(codes, scale, block), (fp8_values(codes) * each).float())
    # amax / 448 by blocks, the nearest code: half a step of the mantissa, or of the subnormals
    error = (fp8_values(codes) * each - w).abs()
    assert bool((error <= torch.maximum(w.abs() / 16, each * 2.0**-10) * (1 + 1e-6)).all())
    assert same(scale, block_amax(w, block) / 448)
    for *lead, i, j in itertools.product(*(range(0, n, 3) for n in scale.shape)):
        part = w[tuple(lead)][i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
        assert float(part.abs().max()) / 448 == pytest.approx(float(scale[(*lead, i, j)]), rel=1e-6)


@pytest.mark.parametrize("rule", ["divide", "multiply"])
@pytest.mark.parametrize("value", [1.0, 0.37, 1e-4, 3e5, 2.0**-110])
def test_every_fp8_code_comes_back(rule: fp8.Fp8Rule, value: float) -> None:
    codes = CODES.view(torch.float8_e4m3fn).view(8, 32)
    scale = gaussian(2, 4).exp() * value
    again = encode_fp8(decode_fp8(codes, scale, (4, 8)), (4, 8), scale, rule)
    assert same(again.codes, codes) and again.scale is scale


def test_e5m2_and_other_scales() -> None:
    codes = CODES.view(torch.float8_e5m2).view(16, 16)
    assert same(decode_fp8(codes, torch.tensor([0.5]), (16, 16)), codes.float() * 0.5)
    codes = CODES.view(torch.float8_e4m3fn).view(16, 16)
    exponents = torch.tensor([[0, 1], [127, 254]], dtype=torch.uint8)
    expected = fp8_values(codes) * 2.0 ** (expanded(exponents, (8, 8), codes.shape).double() - 127)
    assert same(decode_fp8(codes, exponents, (8, 8)), expected.float())
    assert same(decode_fp8(codes, exponents.view(torch.float8_e8m0fnu), (8, 8)), expected.float())
    assert decode_fp8(codes, torch.tensor([255], dtype=torch.uint8), (16, 16)).isnan().all()
    with pytest.raises(ValueError, match=r"expected scales \(2, 2\)"):
        decode_fp8(codes, torch.ones(2, 3), (8, 8))


@pytest.mark.parametrize("rule", ["divide", "multiply", "power"])
def test_fp8_at_the_ends(rule: fp8.Fp8Rule) -> None:
    w = torch.zeros(4, 8)
    w[1] = -0.0
    w[2, 0], w[3, 0] = 3e38, 1e-44
    codes, scale = encode_fp8(w, (1, 8), rule=rule)
    assert bool((scale.isfinite() & (scale > 0)).all())
    read = decode_fp8(codes, scale, (1, 8))
    assert (
        same(read[:2], w[:2])
        and read[2, 0] == pytest.approx(3e38, rel=0.07)
        and bool((read[3].abs() < 2e-44).all())
    )
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="not finite"):
            encode_fp8(torch.tensor([[1.0, bad]]), (1, 2), rule=rule)
    given = torch.tensor([[1.0], [0.0], [0.5], [math.nan]])
    codes, _ = encode_fp8(
        torch.tensor([[1e6, -math.inf], [0.0, -0.0], [-1e6, math.nan], [1.0, 1.0]]),
        (1, 2),
        given,
        "divide",
    )
    expected = torch.tensor([[448, -448], [0.0, -0.0], [-448, math.nan], [math.nan, math.nan]])
    assert same(codes.float(), expected)
    assert (
        encode_fp8(gaussian(4, 8), (4, 8), scale_dtype=torch.bfloat16).scale.dtype == torch.bfloat16
    )


def test_fp8_rounds_ties_to_even() -> None:
    value = fp8_values(CODES[:127])
    middle = (value[1:] + value[:-1]) / 2
    expected = CODES[:126] + CODES[:126] % 2
    for sign, bit in ((1, 0), (-1, 128)):
        codes, _ = encode_fp8((sign * middle).float()[None], (1, 126), torch.ones(1))
        assert same(codes.view(torch.uint8)[0], expected + bit)


def test_fp8_of_compressed_tensors(tool_tensors) -> None:
    theirs = tool_tensors("compressed-tensors")
    w = theirs["w"]
    for name, block in (
        ("tensor", w.shape),
        ("channel", (1, w.shape[1])),
        ("block", format_tools.BLOCK),
    ):
        key = f"compressed-tensors.fp8-{name}"
        codes, scale = encode_fp8(w, tuple(block))
        assert same(codes, theirs[f"{key}.weight"]) and same(
            scale.flatten(), theirs[f"{key}.weight_scale"].flatten()
        ), name
        agree(decode_fp8(codes, scale, tuple(block)), theirs, f"{key}.decoded")


def test_fp8_of_transformers(tool_tensors) -> None:
    theirs = tool_tensors("transformers")
    rules: list[tuple[str, fp8.Fp8Rule, torch.dtype]] = [
        ("float", "multiply", torch.float32),
        ("ue8m0", "power", torch.float8_e8m0fnu),
    ]
    for name, rule, dtype in rules:
        codes, scale = encode_fp8(theirs["w"], format_tools.BLOCK, rule=rule, scale_dtype=dtype)
        assert same(codes, theirs[f"transformers.{name}.weight"]) and same(
            scale, theirs[f"transformers.{name}.weight_scale_inv"]
        )
        agree(decode_fp8(codes, scale, format_tools.BLOCK), theirs, f"transformers.{name}.decoded")


# FP4


def nibbles(packed: Tensor) -> Tensor:
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2).long()


def test_every_fp4_code_decodes() -> None:
    codes = CODES.view(16, 1, 16)
    assert same(
        decode_mxfp4(codes, torch.full((16, 1), 127, dtype=torch.uint8)),
        FP4[nibbles(CODES)].float().view(16, 32),
    )
    one = torch.ones(16, 2).to(torch.float8_e4m3fn)
    assert same(
        decode_nvfp4(CODES.view(16, 16), one, TensorScale(torch.ones(1), divides=True)),
        FP4[nibbles(CODES)].float().view(16, 32),
    )


def test_every_mx_scale_decodes_and_comes_back() -> None:
    codes = CODES.view(1, 16, 16).expand(256, 16, 16).contiguous()
    scales = CODES[:, None].expand(256, 16).contiguous()
    read = decode_mxfp4(codes, scales)
    expected = FP4[nibbles(codes)].view(256, 16, 32) * 2.0 ** (scales.double()[..., None] - 127)
    assert same(read[:255], expected.float().view(256, 512)[:255]) and read[255].isnan().all()
    fits = read.view(256, 16, 32).isfinite().all(2)  # 4 · 2^126 is not a float32
    again = encode_mxfp4(read, scales)
    assert same(again.codes[fits], codes[fits]) and bool(fits[:253].all())


@pytest.mark.parametrize("rule", ["floor", "even", "up"])
def test_values_of_mxfp4_come_back(rule: fp4.MxRule) -> None:
    scales = torch.arange(3, 253, dtype=torch.uint8)[:, None].repeat(1, 4)
    codes = torch.randint(
        256, (250, 4, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    # codes 0 to 3 only, 0 and 1, 0
    codes[:, 1:] &= torch.tensor([0xBB, 0x99, 0x88], dtype=torch.uint8)[:, None]
    read = decode_mxfp4(codes, scales)
    again = encode_mxfp4(read, rule=rule)
    assert same(decode_mxfp4(*again), read)
    large = (nibbles(codes) & 7).amax(2) >= 6
    assert (
        bool(large[:, 0].all())
        and same(again.codes[large], codes[large])
        and same(again.scale[large], scales[large])
    )
    assert not bool((again.scale == scales)[:, 1:].any())


@pytest.mark.parametrize("sign", [1, -1])
def test_fp4_rounds_to_nearest_even_and_saturates(sign: int) -> None:
    ties = torch.tensor([(low + high) / 2 for low, high in itertools.pairwise(E2M1)])
    w = torch.cat(
        [
            ties,
            ties.nextafter(ties - 1),
            ties.nextafter(ties + 1),
            torch.tensor([6.5, 1e30, math.inf, 0.0]),
        ]
    )
    low = torch.arange(7)
    expected = [*(low + low % 2), *low, *(low + 1), 7, 7, 7, 0]
    w = torch.nn.functional.pad(w, (0, 32 - len(w)))[None] * sign
    codes = nibbles(encode_mxfp4(w, torch.full((1, 1), 127, dtype=torch.uint8)).codes)[
        0, 0, : len(expected)
    ]
    assert codes.tolist() == [int(code) + (8 if sign < 0 else 0) for code in expected]


def test_mx_scales_by_rule() -> None:
    largest = torch.tensor(
        [4.0, 6.0, 6.001, 6.999, 7.0, 7.999, 1.0, 0.0, 2e38, 1e-44, math.nan, math.inf]
    )
    w = torch.zeros(len(largest), 32)
    w[:, 3] = -largest
    expected = {
        "floor": [127, 127, 127, 127, 127, 127, 125, 0, 252, 0, 255, 255],
        "even": [127, 127, 127, 127, 128, 128, 125, 0, 252, 0, 255, 255],
        "up": [127, 127, 128, 128, 128, 128, 125, 0, 252, 1, 255, 255],
    }
    rule: fp4.MxRule
    for rule in ("floor", "even", "up"):
        codes, scale = encode_mxfp4(w, rule=rule)
        assert scale.flatten().tolist() == expected[rule], rule
        read = decode_mxfp4(codes, scale)
        assert (
            read[10:, 3].isnan().all()
            and read[:10].isfinite().all()
            and same(read[:10, :3], torch.zeros(10, 3))
        )
        assert not codes[10].any() and not codes[11, 0, 0]


@pytest.mark.parametrize("divides", [True, False])
def test_nvfp4_by_definition(divides: bool) -> None:
    w = gaussian(6, 80) * gaussian(6, 1).exp()
    w[2] = 0
    w[3, :16] *= 1e-9
    whole = TensorScale.fitting(w.abs().max(), divides)
    codes, scale, _ = encode_nvfp4(w, whole)
    assert float(scale.float().max()) == 448 and bool((scale.float() > 0).all())
    local = (
        scale.double() / whole.value.double() if divides else scale.double() * whole.value.double()
    )
    values = FP4[nibbles(codes)] * local.repeat_interleave(16, 1)
    read = decode_nvfp4(codes, scale, whole)
    assert torch.allclose(read.double(), values, rtol=2e-7, atol=0)
    assert same(read, (FP4[nibbles(codes)].float() * local.float().repeat_interleave(16, 1)))
    step = local.repeat_interleave(16, 1)
    assert bool(
        ((values - w).abs() <= torch.maximum(w.abs() / 4, step / 4) * 1.001 + 0.07 * w.abs()).all()
    )
    assert scale[2].float().tolist() == [0.125 if divides else 1.0] * 5
    with pytest.raises(ValueError, match="not finite"):
        encode_nvfp4(torch.full((1, 16), math.inf), whole)


@pytest.mark.parametrize("divides", [True, False])
def test_every_nvfp4_code_and_scale_comes_back(divides: bool) -> None:
    scale = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn)[:, None].repeat(1, 32)
    codes = CODES.repeat(126, 1)
    whole = TensorScale(torch.tensor([1234.5]) if divides else torch.tensor(0.00321), divides)
    read = decode_nvfp4(codes, scale, whole)
    assert same(encode_nvfp4(read, whole, scale=scale).codes, codes)


def test_divisor_and_factor_at_the_ends() -> None:
    fitting = lambda amax, divides: TensorScale.fitting(torch.tensor(amax), divides).value.tolist()
    assert fitting(2.0, True) == [1344.0] and fitting(2688.0, False) == 1
    assert fitting(0.0, True) == [1.0] and fitting(0.0, False) == 1


def test_mxfp4_of_torchao(tool_tensors) -> None:
    theirs = tool_tensors("torchao")
    w = theirs["w"]
    rule: fp4.MxRule
    for rule in ("floor", "even"):
        codes, scale = encode_mxfp4(w, rule=rule)
        assert same(codes.flatten(1), theirs[f"torchao.mxfp4-{rule}.qdata"]) and same(
            scale, theirs[f"torchao.mxfp4-{rule}.scale"]
        )
        agree(decode_mxfp4(codes, scale), theirs, f"torchao.mxfp4-{rule}.decoded")


def test_mxfp4_of_compressed_tensors(tool_tensors) -> None:
    theirs = tool_tensors("compressed-tensors")
    name, w = "compressed-tensors.mxfp4", theirs["w"]
    kept = theirs[f"{name}.weight_scale"]
    codes, scale = encode_mxfp4(w, rule="even")
    zeros = w.view(len(w), -1, 32).abs().amax(2) == 0
    assert same(scale[~zeros], kept[~zeros]) and same(
        encode_mxfp4(w, kept).codes.flatten(1), theirs[f"{name}.weight_packed"]
    )
    agree(
        decode_mxfp4(theirs[f"{name}.weight_packed"].view(codes.shape), kept),
        theirs,
        f"{name}.decoded",
        torch.bfloat16,
    )


def test_mxfp4_of_transformers(tool_tensors) -> None:
    name, theirs = "transformers.mxfp4", tool_tensors("transformers")
    read = decode_mxfp4(theirs[f"{name}.blocks"], theirs[f"{name}.scales"]).transpose(1, 2)
    agree(read, theirs, f"{name}.decoded", torch.bfloat16)


def test_nvfp4_of_compressed_tensors(tool_tensors) -> None:
    theirs = tool_tensors("compressed-tensors")
    name, w = "compressed-tensors.nvfp4", theirs["w"]
    whole = TensorScale.fitting(w.abs().max(), divides=True)
    codes, scale, _ = encode_nvfp4(w, whole)
    assert same(whole.value, theirs[f"{name}.weight_global_scale"]) and same(
        scale, theirs[f"{name}.weight_scale"]
    )
    assert same(codes, theirs[f"{name}.weight_packed"])
    agree(decode_nvfp4(codes, scale, whole), theirs, f"{name}.decoded", torch.bfloat16)


def test_pieces_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    w = gaussian(40, 96)
    runs = []
    for piece in (1, 500, 1 << 20):
        monkeypatch.setattr(grid, "PIECE", piece)
        fp8, mx = encode_fp8(w, (16, 32)), encode_mxfp4(w)
        runs.append([*fp8, *mx, decode_fp8(*fp8, (16, 32)), decode_mxfp4(*mx)])
    for other in runs[1:]:
        assert all(same(a, b) for a, b in zip(runs[0], other, strict=True))
    t = w.T  # not contiguous
    assert same(encode_fp8(t, (32, 16)).codes.T.contiguous(), runs[0][0]) and same(
        encode_mxfp4(t[:, :32]).codes, encode_mxfp4(t[:, :32].clone()).codes
    )

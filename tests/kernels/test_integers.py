"""QuantizedWeight integers: the formats' own tools, and plain arithmetic on bits."""

import math

import pytest
import torch
from torch import Tensor

from adapterkit.kernels.quant import grid
from adapterkit.kernels.quant.integers import (
    decode_int8,
    decode_packed,
    decode_torchao_int4,
    encode_integers,
    pack,
    pack_zeros,
    unpack,
    unpack_zeros,
)
from tests.support import format_tools

pytestmark = pytest.mark.quick


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid, "PIECE", 200)


def agree(
    ours: Tensor, tensors: dict[str, Tensor], key: str, dtype: torch.dtype = torch.float32
) -> None:
    """`ours`, rounded, is what the tool read."""
    small = len(tensors["w"]) == 16
    assert torch.equal(
        format_tools.digest(ours.to(dtype)) if small else ours.to(dtype), tensors[key]
    ), key


def randoms(*shape: int, low: int = -128, high: int = 128, seed: int = 0) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def bits_of(words: Tensor, bits: int, m: int) -> Tensor:
    """Unsigned codes of each row, from its bits written out."""
    rows = []
    for row in words.tolist():
        number = sum((word % 2**32) << (32 * i) for i, word in enumerate(row))
        rows.append([(number >> (bits * i)) % 2**bits for i in range(m)])
    return torch.tensor(rows)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("m", [1, 7, 8, 32, 45, 64])
def test_codes_in_words(bits: int, m: int) -> None:
    codes = randoms(3, m, low=-(2 ** (bits - 1)), high=2 ** (bits - 1)).to(torch.int8)
    words = pack(codes, bits)
    assert words.dtype == torch.int32 and words.shape == (3, math.ceil(m * bits / 32))
    assert torch.equal(bits_of(words, bits, m), codes.long() + 2 ** (bits - 1))
    assert torch.equal(unpack(words, bits, m), codes)
    total = words.shape[1] * 32 // bits
    assert not bits_of(words, bits, total)[:, m:].any()


def test_zeros_of_few_rows() -> None:
    zero = randoms(8, 5, low=-8, high=8).to(torch.int8)
    words = pack_zeros(zero, 4)
    assert (
        words.shape == (1, 5)
        and words.is_contiguous()
        and torch.equal(unpack_zeros(words, 4, 8), zero)
    )
    assert torch.equal(unpack_zeros(pack_zeros(zero[:3, :1], 4), 4, 3), zero[:3, :1])


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("size", [96, 90, 33])
@pytest.mark.parametrize("form", ["groups", "one", "channel", "zero", "group"])
def test_decode_packed_and_int8(bits: int, size: int, form: str) -> None:
    half = 2 ** (bits - 1)
    codes = randoms(11, size, low=-half, high=half).to(torch.int8)
    groups = {"one": 1, "channel": 1}.get(form, 3 if size == 33 else 6)
    scale = randoms(1 if form == "one" else 11, groups, low=1, high=1000, seed=1) / 997
    zero = (
        randoms(11, groups, low=-half, high=half, seed=2).to(torch.int8)
        if form in ("zero", "group")
        else None
    )
    index = torch.arange(size) // (size // groups)
    if form == "group":
        index = index[torch.randperm(size, generator=torch.Generator().manual_seed(3))]
    group = index.int() if form == "group" else None
    shift = 0 if zero is None else zero[:, index].double()
    exact = ((codes.double() - shift) * scale.expand(11, -1)[:, index].double()).float()
    words = pack(codes, bits)
    assert torch.equal(decode_packed(words, scale, bits, size, zero, group), exact)
    assert torch.equal(decode_int8(codes, scale, zero, group), exact)
    again = encode_integers(exact, bits, scale=scale, zero=zero, group=group)
    assert torch.equal(again.codes, codes)


def test_scale_of_one_value_may_have_any_shape() -> None:
    codes = randoms(3, 8).to(torch.int8)
    for scale in (torch.tensor(0.5), torch.tensor([0.5]), torch.tensor([[0.5]])):
        assert torch.equal(decode_int8(codes, scale), codes * 0.5)
    assert torch.equal(
        decode_int8(codes, torch.tensor([0.5, 1, 2])), codes * torch.tensor([[0.5], [1], [2]])
    )


def test_a_group_in_order_is_no_group() -> None:
    codes, scale = randoms(4, 64).to(torch.int8), randoms(4, 2, low=1, high=9).float()
    assert torch.equal(
        decode_int8(codes, scale, group=torch.arange(64) // 32), decode_int8(codes, scale)
    )
    uneven = torch.arange(64) // 48
    assert torch.equal(decode_int8(codes, scale, group=uneven), codes * scale[:, uneven])
    with pytest.raises(ValueError, match="64 columns do not divide into 3 groups"):
        decode_int8(codes, scale[:, :1].expand(4, 3))


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_errors_and_ends(bits: int, symmetric: bool) -> None:
    w = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    w[1] = 0
    w[2] = w[2].abs() + 3  # 0 is far from its values
    codes, scale, zero = encode_integers(w, bits, 16, symmetric=symmetric)
    read = decode_int8(codes, scale, zero)
    step = scale.repeat_interleave(16, 1)
    assert bool(((read - w).abs() <= step * (0.51 if symmetric else 1.01)).all())
    assert bool((scale > 0).all()) and not read[1].any() and (zero is None) == symmetric
    for bad in (math.nan, math.inf):
        x = w.clone()
        x[3, 5] = bad
        with pytest.raises(ValueError, match="not finite"):
            encode_integers(x, bits, 16, symmetric=symmetric)
        with pytest.raises(ValueError, match="not finite"):
            encode_integers(x, bits, scale=scale, zero=zero)
    huge = encode_integers(w * 1e9, bits, scale=scale, zero=zero).codes
    assert set(huge[w.abs() > 0.1].tolist()) == {-(2 ** (bits - 1)), 2 ** (bits - 1) - 1}
    nothing = torch.zeros_like(scale)
    assert not encode_integers(torch.zeros_like(w), bits, scale=nothing).codes.any()


def test_integers_round_ties_to_even() -> None:
    w = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5]])
    assert encode_integers(w, 8, scale=torch.ones(1)).codes.tolist() == [[0, 2, 2, 0, -2, -2]]


def test_integers_of_compressed_tensors(tool_tensors) -> None:
    theirs = tool_tensors("compressed-tensors")
    w = theirs["w"]
    out, size = w.shape
    cases = [
        ("int3", 3, 32, True),
        ("int4", 4, 32, True),
        ("int8", 8, 32, True),
        ("int4-zero", 4, 16, False),
    ]
    for name, bits, group, symmetric in cases:
        key = f"compressed-tensors.{name}"
        codes, scale, zero = encode_integers(w, bits, group, symmetric=symmetric)
        words = pack(codes, bits)
        assert torch.equal(words, theirs[f"{key}.weight_packed"]) and torch.equal(
            scale, theirs[f"{key}.weight_scale"]
        )
        assert theirs[f"{key}.weight_shape"].tolist() == [out, size]
        if zero is not None:
            assert torch.equal(pack_zeros(zero, bits), theirs[f"{key}.weight_zero_point"])
            assert torch.equal(unpack_zeros(theirs[f"{key}.weight_zero_point"], bits, out), zero)
        agree(decode_packed(words, scale, bits, size, zero), theirs, f"{key}.decoded")
    for name, symmetric in (("int8-channel", True), ("int8-zero", False)):
        key = f"compressed-tensors.{name}"
        codes, scale, zero = encode_integers(w, 8, symmetric=symmetric)
        assert torch.equal(codes, theirs[f"{key}.weight"]) and torch.equal(
            scale, theirs[f"{key}.weight_scale"]
        )
        assert zero is None or torch.equal(zero, theirs[f"{key}.weight_zero_point"])
        agree(decode_int8(codes, scale, zero), theirs, f"{key}.decoded")


def test_int8_of_torchao(tool_tensors) -> None:
    theirs = tool_tensors("torchao")
    for name in ("symmetric", "asymmetric"):
        key = f"torchao.int8-{name}"
        zero = theirs.get(f"{key}.zero_point")
        read = decode_int8(theirs[f"{key}.qdata"], theirs[f"{key}.scale"], zero)
        agree(read, theirs, f"{key}.decoded", torch.bfloat16)


def test_int4_of_torchao() -> None:
    codes = randoms(11, 64, low=-8, high=8)
    stored = ((codes[:, ::2] & 15) | ((codes[:, 1::2] & 15) << 4)).to(torch.uint8)
    scale, zero = (
        torch.rand(4, 11, generator=torch.Generator().manual_seed(s)).bfloat16() for s in (1, 2)
    )
    index = torch.arange(64) // 16
    expected = (codes * scale.T[:, index].float()) + zero.T[:, index].float()
    assert torch.equal(decode_torchao_int4(stored, scale, zero), expected)

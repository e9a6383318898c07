"""bitsandbytes' blocks and rows: bitsandbytes itself on the CPU, bit for bit, and plain arithmetic
in float64."""

import math

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor

from adapterkit.kernels.quant import blockwise, grid
from adapterkit.kernels.quant.blockwise import (
    BLOCKS,
    ORDER,
    decode_4bit,
    decode_absmax,
    dynamic_map,
    encode_4bit,
    quant_map,
    quantize_4bit,
    quantize_absmax,
)
from adapterkit.kernels.quant.llm_int8 import decode_int8, quantize_int8
from tests.support.bits import same

F = bnb.functional
KINDS = ["nf4", "fp4"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def neighbors(x: Tensor, steps: int = 2) -> Tensor:
    """x and the floats next to it."""
    actual = [x]
    for end in (-math.inf, math.inf):
        y = x
        for _ in range(steps):
            y = torch.nextafter(y, torch.tensor(end))
            actual.append(y)
    return torch.cat(actual)


def hard(kind: blockwise.Kind, blocksize: int, dtype: torch.dtype) -> Tensor:
    """Whole blocks of this size that hurt, in a row; without what the dtype cannot hold."""
    values = quant_map(kind).sort().values
    near = neighbors(
        torch.cat([(values[1:] + values[:-1]) / 2, values, torch.tensor([1e-40, -1e-40])])
    ).clamp(-1, 1)
    blocks = [
        torch.zeros(blocksize),
        torch.full((blocksize,), -0.0),
        torch.ones(blocksize),
        normal(blocksize).sign(),
    ]
    for scale in (
        1.0,
        0.37,
        -3.1,
        1e-4,
        1e-30,
        1e30,
        3.4e38,
        1.1e-38,
        0.9e-38,
        3e-39,
        1e-42,
        1e-45,
    ):
        each = torch.zeros(-(-len(near) // (blocksize - 1)) * (blocksize - 1))
        each[: len(near)] = near
        each = torch.cat(
            [torch.ones(len(each) // (blocksize - 1), 1), each.view(-1, blocksize - 1)], 1
        )
        blocks += [(each * scale).flatten(), normal(blocksize) * min(scale, 1e37)]
    blocks = torch.cat(blocks).view(-1, blocksize).to(dtype)
    return blocks[blocks.isfinite().all(1)].flatten()


pytestmark = [pytest.mark.quick, pytest.mark.usefixtures("one_thread")]


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid, "LARGE_PIECE", 3000)


def encodes(w: Tensor, kind: blockwise.Kind, blocksize: int) -> None:
    packed, state = F.quantize_4bit(w, quant_type=kind, blocksize=blocksize)
    ours = quantize_4bit(w, kind, blocksize)
    assert same(ours.absmax, state.absmax)
    assert ours.packed.shape == packed.shape and same(ours.packed, packed)
    assert same(encode_4bit(w + 0, ours.absmax, kind, blocksize), packed)  # + 0: no -0


def test_code_maps_equal_bitsandbytes() -> None:
    for kind in KINDS:
        assert same(quant_map(kind), F.get_4bit_type(kind, device="cpu"))
        assert torch.equal(quant_map(kind)[list(ORDER[kind])], quant_map(kind).sort().values)
    assert same(dynamic_map(), F.create_dynamic_map())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_million_values_are_encoded_as_bitsandbytes(
    kind: blockwise.Kind, dtype: torch.dtype
) -> None:
    encodes((normal(1 << 10, 1 << 10) * 0.02).to(dtype), kind, 64)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("blocksize", "dtype"),
    [*((b, torch.float32) for b in BLOCKS), *((b, d) for b in (64, 2048) for d in DTYPES[1:])],
    ids=str,
)
@pytest.mark.usefixtures("small_pieces")
def test_hard_values_and_odd_sizes_are_encoded_as_bitsandbytes(
    kind: blockwise.Kind, blocksize: int, dtype: torch.dtype
) -> None:
    w = hard(kind, blocksize, dtype)
    assert len(w) > 16 * blocksize
    encodes(w, kind, blocksize)
    encodes(w.view(-1, 16).T, kind, blocksize)  # not contiguous
    for size in (
        1,
        2,
        31,
        blocksize - 1,
        blocksize,
        blocksize + 1,
        3 * blocksize - 1,
        5 * blocksize + 7,
    ):
        encodes(normal(size, seed=size).to(dtype), kind, blocksize)
        encodes(torch.zeros(size, dtype=dtype), kind, blocksize)
        encodes(w[:size].clone(), kind, blocksize)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [3, 17, 63])
@pytest.mark.parametrize("scale", [1.0, 0.37, 1e-4, 1e30, 3e38, 1e-38, 1e-39, 1e-44])
def test_thresholds_in_a_short_block(kind: blockwise.Kind, size: int, scale: float) -> None:
    values = quant_map(kind).sort().values
    for part in neighbors((values[1:] + values[:-1]) / 2).split(size - 1):
        encodes(torch.cat([torch.tensor([scale]), part * scale]), kind, 64)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decodes_as_bitsandbytes(kind: blockwise.Kind, dtype: torch.dtype) -> None:
    for scale in (1.0, 1e-6, 6e4, 1e-38 if dtype == torch.float32 else 1.0):
        w = (normal(48, 256) * scale).clamp(-65504, 65504).to(dtype)
        for blocksize in (32, 64, 128, 256):
            packed, state = F.quantize_4bit(w, quant_type=kind, blocksize=blocksize)
            read = (
                decode_4bit(packed, state.absmax, kind, blocksize, w.numel())
                .to(dtype)
                .view(w.shape)
            )
            assert torch.equal(read, F.dequantize_4bit(packed, state))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("blocksize", [32, 64, 4096])
@pytest.mark.parametrize("size", [1, 2, 63, 64, 96, 1000, 8195])
@pytest.mark.usefixtures("small_pieces")
def test_every_element_gets_the_nearest_code(
    kind: blockwise.Kind, blocksize: int, size: int
) -> None:
    """Every element has the nearest code, and is that times its block's absmax, rounded once."""
    w = normal(size, seed=size) * 0.1
    packed, absmax = quantize_4bit(w, kind, blocksize)
    read = decode_4bit(packed, absmax, kind, blocksize, size)
    scale = absmax.double().repeat_interleave(blocksize)[:size]
    bytes_ = packed.flatten().int()
    codes = torch.stack([bytes_ >> 4, bytes_ & 15], 1).flatten()
    assert torch.equal(read, (quant_map(kind).double()[codes[:size]] * scale).float())
    assert not size % 2 or codes[size] == (7 if kind == "nf4" else 0)
    distance = (w.double() / scale)[:, None] - quant_map(kind).double()
    assert bool(
        (
            distance.gather(1, codes[:size, None].long()).abs()[:, 0]
            <= distance.abs().amin(1) + 1e-7
        ).all()
    )
    storage = packed.new_zeros(len(packed) + -len(packed) % 2).view(torch.bfloat16)
    storage.view(torch.uint8)[: len(packed)] = packed.flatten()
    if len(packed) % 2 == 0:
        assert same(decode_4bit(storage[:, None], absmax, kind, blocksize, size), read)


@pytest.mark.parametrize("kind", KINDS)
def test_codes_come_back(kind: blockwise.Kind) -> None:
    """Beside their scales all do; beside scales made anew, where one of ±1 is in the block, fp4's
    second zero apart."""
    packed = torch.randint(
        0, 256, (32 * 64, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    for scales in (
        normal(64).abs(),
        normal(64),
        normal(64).sign() * 2.0 ** torch.linspace(-126, 127.9, 64),
        torch.full((64,), 1e-38),
    ):
        read = decode_4bit(packed, scales, kind, 64, 4096)
        assert torch.equal(encode_4bit(read, scales, kind, 64), packed)
        short = decode_4bit(packed[:-3], scales, kind, 64, 4090)
        assert torch.equal(encode_4bit(short, scales, kind, 64), packed[:-3])
    scales = torch.cat([normal(60).abs() * 1e-3, torch.tensor([3e38, 1e30, 1.2e-38, 1e-30])])
    top = {"nf4": 0xF7, "fp4": 0x30}[kind]
    packed[::32] = top
    if kind == "fp4":
        packed = torch.where(packed & 0xF0 == 0x80, packed & 0x0F, packed)
        packed = torch.where(packed & 0x0F == 0x08, packed & 0xF0, packed)
    again = quantize_4bit(decode_4bit(packed, scales, kind, 64, 4096), kind)
    assert torch.equal(again.packed, packed) and same(again.absmax, scales)


def test_a_scale_of_zero_holds_zeros() -> None:
    for kind, code in (("nf4", 0x77), ("fp4", 0x00)):
        packed = torch.full((32, 1), 0x5A, dtype=torch.uint8)
        read = decode_4bit(packed, torch.zeros(1), kind, 64, 64)
        assert not read.any()
        assert set(encode_4bit(read.abs(), torch.zeros(1), kind).flatten().tolist()) == {code}


def test_values_beyond_a_scale_saturate() -> None:
    for value, scale in ((9.0, 1.0), (-9.0, -1.0), (3e38, 1e-38), (3e38, 0.0)):
        w = torch.tensor([value, -value] * 32)
        for kind, byte in (("nf4", 0xF0), ("fp4", 0x3B)):
            assert set(encode_4bit(w, torch.tensor([scale]), kind).flatten().tolist()) == {byte}


@pytest.mark.parametrize("size", [1, 2, 255, 256, 257, 5000, 40_000, 300_000])
@pytest.mark.parametrize("spread", [0.0, 1e-3, 1.0])
def test_double_quantization_equals_bitsandbytes(size: int, spread: float) -> None:
    absmax = normal(size, seed=size).abs() * spread + 0.05
    offset = absmax.mean()
    torch.set_num_threads(4)
    nested = quantize_absmax(absmax)
    codes, state = F.quantize_blockwise(absmax - offset, blocksize=256)
    assert (
        same(nested.offset, offset)
        and same(nested.absmax, state.absmax)
        and same(nested.codes, codes)
    )
    assert same(
        decode_absmax(*nested[:2], dynamic_map(), nested.offset),
        F.dequantize_blockwise(codes, state) + offset,
    )
    given = quantize_absmax(absmax, float(offset), nested.absmax, dynamic_map())
    assert all(same(a, b) for a, b in zip(given, nested, strict=True))


def test_double_quantization_of_what_hurts() -> None:
    edges = ((torch.arange(65536, dtype=torch.float64) - 0.5) / 65535 * 2 - 1).float()
    middles = (dynamic_map()[1:] + dynamic_map()[:-1]) / 2
    x = neighbors(torch.cat([edges, middles, dynamic_map()])).clamp(-1, 1)
    x = torch.nn.functional.pad(x, (0, -len(x) % 255)).view(-1, 255)
    x = torch.cat([torch.ones(len(x), 1), x], 1).flatten()
    tiny = [
        torch.zeros(256),
        torch.full((256,), 1e-40),
        torch.tensor([1e-40, -1e-45] + [0.0] * 254),
        torch.full((9,), 3e38),
    ]
    for each in (x, x * 0.37, x * -1e-30, *tiny):
        codes, state = F.quantize_blockwise(each, blocksize=256)
        ours = quantize_absmax(each, 0.0)
        assert same(ours.absmax, state.absmax) and same(ours.codes, codes)
    old = dynamic_map().clone()
    old[0] = -1
    codes, _ = F.quantize_blockwise(x, code=old, blocksize=256)
    assert same(quantize_absmax(x, 0.0, values=old).codes, codes)


def test_double_quantization_in_another_dtype() -> None:
    """What bitsandbytes makes of a bf16 model that was used before it was saved."""
    absmax = normal(700).abs().bfloat16()
    offset = absmax.mean()
    codes, state = F.quantize_blockwise(absmax - offset, blocksize=256)
    assert state.dtype == torch.bfloat16
    theirs = F.dequantize_blockwise(codes, state)
    theirs += torch.tensor(offset.item())
    assert same(
        decode_absmax(codes, state.absmax, state.code, offset.item(), dtype=torch.bfloat16),
        theirs.float(),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("small_pieces")
def test_int8_equals_bitsandbytes(dtype: torch.dtype) -> None:
    w = normal(64, 70)
    w[3], w[4], w[5] = 0, 0.5, -0.0
    w[6, :35], w[6, 35:] = 2.0, -2.0
    w[7:23] *= 2.0 ** torch.arange(-24, -8)[:, None]
    w[23] = (torch.arange(70) + 0.5) / 127  # ties
    w[24] *= 1e4
    w = w.to(dtype)
    theirs = bnb.nn.Int8Params(w, requires_grad=False).to("cpu")
    ours = quantize_int8(w)
    assert same(ours.codes, theirs.data) and same(ours.scale, theirs.SCB)
    read = decode_int8(*ours)
    assert same(read, F.int8_vectorwise_dequant(theirs.data, theirs.SCB))
    assert same(decode_int8(ours.codes[5:9], ours.scale[5:9]), read[5:9])
    exact = ours.codes.double() * ours.scale.double()[:, None] / 127
    assert torch.allclose(read.double(), exact, rtol=2e-7, atol=0)
    assert bool(((exact - w.half().double()).abs() <= ours.scale.double()[:, None] / 253.9).all())
    normals = ours.scale >= 2.0**-14
    for again in (quantize_int8(read), quantize_int8(read, ours.scale)):
        assert same(again.codes[normals], ours.codes[normals]) and same(
            again.scale[normals], ours.scale[normals]
        )
    every = torch.arange(-127, 128, dtype=torch.int8).expand(40, 255)
    scale = (normal(40).abs() * 3 + 1e-3).half().float()
    again = quantize_int8(decode_int8(every, scale))
    assert torch.equal(again.codes, every) and same(again.scale, scale)
    assert quantize_int8(torch.tensor([[9.0, -9.0]]), torch.ones(1)).codes.tolist() == [[127, -127]]
    assert not quantize_int8(torch.tensor([[9.0, -9.0]]), torch.zeros(1)).codes.any()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    w = normal(5, 64)
    w[3, 7] = bad
    for kind in KINDS:
        with pytest.raises(ValueError, match="not finite"):
            quantize_4bit(w, kind)
        with pytest.raises(ValueError, match="not finite"):
            quantize_4bit(w.flatten()[: 3 * 64 + 8], kind)
        with pytest.raises(ValueError, match="not finite"):
            encode_4bit(w, torch.ones(5), kind)
    with pytest.raises(ValueError, match="the scales hold"):
        quantize_absmax(w[3])
    with pytest.raises(ValueError, match="the scales hold"):
        quantize_absmax(w[0], scale=w[3, 7:8])
    with pytest.raises(ValueError, match="the scales hold"):
        quantize_int8(w[:1], w[3, 7:8])
    with pytest.raises(ValueError, match="the scales hold"):
        encode_4bit(w[0], w[3, 7:8], "nf4")
    for scale in (None, torch.ones(5)):
        with pytest.raises(ValueError, match="not finite in float16"):
            quantize_int8(w, scale)
    with pytest.raises(ValueError, match="not finite in float16"):
        quantize_int8(torch.full((1, 4), 65520.0))


def test_wrong_block_sizes_and_counts_of_scales_are_refused() -> None:
    with pytest.raises(ValueError, match="expected a block size of 32, .*, 4096, not 48"):
        quantize_4bit(normal(96), "nf4", 48)
    with pytest.raises(ValueError, match="expected 2 scales for 96 elements, not \\(3,\\)"):
        encode_4bit(normal(96), torch.ones(3), "nf4")
    with pytest.raises(ValueError, match="expected 2 scales for 96 elements, not \\(2, 1\\)"):
        decode_4bit(torch.zeros(48, 1, dtype=torch.uint8), torch.ones(2, 1), "nf4", 64, 96)
    with pytest.raises(ValueError, match="expected 48 bytes for 96 elements, not 47"):
        decode_4bit(torch.zeros(47, 1, dtype=torch.uint8), torch.ones(2), "nf4", 64, 96)

"""MLX's affine integers against mlx itself, bit for bit."""

import itertools

import pytest
import torch

from adapterkit.kernels.quant import affine
from adapterkit.kernels.quant.stochastic import Draws
from tests.support.mlx_quantized import array, by_mlx, tensor

BITS, SIZES = (2, 3, 4, 5, 6, 8), (32, 64, 128)
PACKINGS = list(itertools.product(BITS, SIZES))
DTYPES = ("float32", "bfloat16", "float16")
Weight = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # words, scale, bias


def drawn(rows: int = 24, columns: int = 256) -> torch.Tensor:
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.05
    w[0] = 0  # rows that a rule may have to treat by themselves
    w[1] = w[1].abs()
    w[2] = -w[2].abs() - 1
    w[3] = 0.25
    return w


def of_mlx(w: torch.Tensor, bits: int, size: int, dtype: str = "float32") -> Weight:
    import mlx.core as mx

    parts = mx.quantize(array(w).astype(getattr(mx, dtype)), group_size=size, bits=bits)
    words = torch.tensor(parts[0].tolist(), dtype=torch.int64).to(torch.uint32)
    scale, bias = (tensor(one).to(getattr(torch, dtype)) for one in parts[1:])
    return words, scale, bias


def decoded(weight: Weight, bits: int, size: int) -> torch.Tensor:
    words, scale, bias = weight
    return affine.decode_words(words, bits, affine.affine_grid(scale, bias, bits, size))


def requantized(
    w: torch.Tensor, old: Weight, bits: int, size: int, draws: Draws | None = None
) -> Weight:
    words, *scales = old
    new = affine.affine_scales(w, bits, size, scales[0].dtype)
    grid_of = lambda scales: affine.affine_grid(scales[0], scales[1], bits, size)
    words, scale, bias = affine.requantize_words(w, words, bits, scales, new, grid_of, draws)
    return words, scale, bias


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "size"), PACKINGS)
def test_mlx_s_codes_decode_to_its_values_bit_for_bit(bits, size, dtype):
    """Of scales in 16 bits, to what mlx computes of them in float32."""
    import mlx.core as mx

    old = of_mlx(drawn(), bits, size, dtype)
    words = mx.array(old[0].numpy())
    scales = (array(one.float()) for one in old[1:])
    expected = tensor(mx.dequantize(words, *scales, group_size=size, bits=bits))
    assert torch.equal(decoded(old, bits, size), expected)


@pytest.mark.parametrize(("bits", "size"), PACKINGS)
def test_scales_are_mlx_s(bits, size):
    w = drawn()
    _, *expected = of_mlx(w, bits, size)
    found = affine.affine_scales(w, bits, size, torch.float32)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "size"), PACKINGS)
def test_another_weight_is_as_near_as_mlx_s_own_quantization(bits, size, dtype):
    w = drawn()
    old = of_mlx(w.roll(5, 0), bits, size, dtype)
    new = requantized(w, old, bits, size)
    assert [one.dtype for one in new] == [one.dtype for one in old]
    error = float((decoded(new, bits, size) - w).norm())
    settings = {"bits": bits, "group_size": size}
    assert error <= 1.0001 * float((by_mlx(w, settings, dtype) - w).norm())


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_words_of_any_bits_come_back(bits, sampled):
    """Also where scales are 0, and where codes are too near for float32."""
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(-(2**31), 2**31, (24, 8 * bits), generator=generator).int()
    scale, bias = (torch.randn(24, 4, generator=generator) for _ in range(2))
    scale[0], scale[1], bias[1] = 0, 1e-9, 3.0
    old = words.view(torch.uint32), scale, bias
    value, draws = decoded(old, bits, 64), Draws.of(0, "w") if sampled else None
    new = requantized(value, old, bits, 64, draws)
    pairs = zip(new, old, strict=True)
    assert all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in pairs)


def test_values_that_are_not_finite_raise():
    w = drawn()
    old = of_mlx(w, 4, 32)
    w[5, 7] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        requantized(w, old, 4, 32)

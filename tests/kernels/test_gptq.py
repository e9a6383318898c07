"""GPTQ's and AWQ's words: read and written, against the formulas on bits in float64 and against
their tool."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from adapterkit.kernels.quant import grid
from adapterkit.kernels.quant.gptq import (
    WordTensors,
    decode_awq,
    decode_gptq,
    gptq_grid,
    requantize_awq,
    requantize_gptq,
)
from adapterkit.kernels.quant.integers import pack
from adapterkit.kernels.quant.stochastic import Draws
from tests.kernels.test_integers import agree, bits_of, randoms
from tests.support.usual import usual

pytestmark = pytest.mark.quick


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid, "PIECE", 200)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("order", ["equal", "shuffled", "uneven"])
def test_gptq_by_bits(bits: int, order: str) -> None:
    size, out, groups = 96, 32, 3
    words = randoms(size * bits // 32, out, low=-(2**31), high=2**31).int()
    zeros = randoms(groups, out * bits // 32, low=-(2**31), high=2**31, seed=1).int()
    scale = torch.rand(groups, out, generator=torch.Generator().manual_seed(2)).half()
    index = torch.arange(size) // (40 if order == "uneven" else 32)
    if order == "shuffled":
        index = index[torch.randperm(size, generator=torch.Generator().manual_seed(3))]
    codes, zero = bits_of(words.T, bits, size), bits_of(zeros, bits, out)
    for group in (index.int(), None) if order == "equal" else (index.int(),):
        exact = ((codes - zero.T[:, index]).double() * scale.T[:, index].double()).float()
        assert torch.equal(
            decode_gptq(WordTensors(words, zeros, scale), bits, size, group, 2), exact
        )
    zero = randoms(groups, out, high=2**bits, low=1)
    exact = ((codes - zero.T[:, index]).double() * scale.T[:, index].double()).float()
    stored = pack((zero - 1 - 2 ** (bits - 1)).to(torch.int8), bits)
    assert torch.equal(
        decode_gptq(WordTensors(words, stored, scale), bits, size, index.int(), 1), exact
    )


def test_gptq_of_its_tool(tool_tensors) -> None:
    theirs = tool_tensors("gptqmodel")
    for bits in (2, 3, 4, 8):
        key = f"gptqmodel.gptq{bits}"
        words, zeros, scale, group = (
            theirs[f"{key}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")
        )
        for version in (1, 2):
            read = decode_gptq(WordTensors(words, zeros, scale), bits, len(group), group, version)
            agree(read, theirs, f"{key}.decoded{version}", torch.float16)
    with pytest.raises(ValueError, match="2, 3, 4 or 8 bits, not 5"):
        decode_gptq(WordTensors(words, zeros, scale), 5, len(group))
    with pytest.raises(ValueError, match="version 1 or 2"):
        decode_gptq(WordTensors(words, zeros, scale), 4, len(group), version=3)


@pytest.mark.parametrize("piece", [1, 200, 1600])
@pytest.mark.parametrize("zeros", [True, False])
def test_awq_by_nibbles(piece: int, zeros: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid, "PIECE", piece)
    words = randoms(64, 4, low=-(2**31), high=2**31).int()
    zwords = randoms(2, 4, low=-(2**31), high=2**31, seed=1).int()
    scale = torch.rand(2, 32, generator=torch.Generator().manual_seed(2)).half()

    def opened(x: Tensor) -> Tensor:  # (m, out)
        place = [0, 4, 1, 5, 2, 6, 3, 7]  # the nibble of each column of eight
        return bits_of(x, 4, 32).view(len(x), 4, 8)[:, :, place].flatten(1)

    codes, zero = opened(words).T, opened(zwords).T if zeros else torch.full((32, 2), 8)
    index = torch.arange(64) // 32
    exact = ((codes - zero[:, index]).double() * scale.T[:, index].double()).float()
    assert torch.equal(decode_awq(WordTensors(words, zwords if zeros else None, scale)), exact)


def test_awq_of_its_tool(tool_tensors) -> None:
    theirs = tool_tensors("gptqmodel")
    words, zeros, scale = (
        theirs[f"gptqmodel.awq.{part}"] for part in ("qweight", "qzeros", "scales")
    )
    agree(
        decode_awq(WordTensors(words, zeros, scale)), theirs, "gptqmodel.awq.decoded", torch.float16
    )


# written again


@dataclass
class Case:
    """A stored weight of any bytes; the codes and zeros of it as their formats state them."""

    old: WordTensors
    bits: int
    group: Tensor  # (in,)
    version: int  # 1 or 2; 0: AWQ
    keep_zeros: bool
    indexed: bool = True

    @property
    def lowest(self) -> int:
        return int(self.version == 1)

    def requantized(self, w: Tensor, draws: Draws | None = None) -> WordTensors:
        if self.version == 0:
            return requantize_awq(w, self.old, keep_zeros=self.keep_zeros, draws=draws)
        group = self.group.int() if self.indexed else None
        return requantize_gptq(
            w, self.old, self.bits, group, self.version, keep_zeros=self.keep_zeros, draws=draws
        )

    def opened(self, one: WordTensors) -> tuple[Tensor, Tensor]:
        """Codes (out, in) and zeros (out, groups), from 0."""
        out, size = one.scale.shape[1], len(self.group)
        if self.version == 0:
            zero = torch.full(one.scale.shape, 8) if one.zeros is None else awq_codes(one.zeros)
            return awq_codes(one.words).T, zero.T
        assert one.zeros is not None
        zero = bits_of(one.zeros, self.bits, out).T
        if self.version == 1:
            zero = gptq_v1_zeros(one.zeros, self.bits, out).T
        return bits_of(one.words.T, self.bits, size), zero

    def decoded(self, one: WordTensors) -> Tensor:  # float64
        """(code - zero) · scale."""
        codes, zero = self.opened(one)
        return (codes - zero[:, self.group]) * one.scale.T[:, self.group].double()

    def errors(self, value: Tensor, w: Tensor) -> Tensor:  # (out, groups)
        squares = (value - w.double()).square()
        return squares.new_zeros(self.old.scale.T.shape).index_add_(1, self.group, squares)

    def kept(self, w: Tensor) -> Tensor:
        """w rounded with the scales and zeros that are there."""
        scale, zero = self.old.scale.T.double(), self.opened(self.old)[1]
        return self.nearest(w, scale, zero)

    def nearest(self, w: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        each, middle = scale[:, self.group], zero[:, self.group]
        codes = (w.double() / torch.where(each == 0, 1, each) + middle).round()
        return (codes.clamp(0, 2**self.bits - 1) - middle) * each

    def minmax(self, w: Tensor) -> Tensor:
        """w rounded with the nearest zero, and the scale that holds all of a group with it."""
        top, shape = 2**self.bits - 1, self.old.scale.T.shape
        index = self.group.expand(len(w), -1)
        high = torch.zeros(shape).scatter_reduce(1, index, w, "amax").double()
        low = torch.zeros(shape).scatter_reduce(1, index, w, "amin").double()
        if self.keep_zeros:
            zero = self.opened(self.old)[1]
        else:
            zero = (-low / (high - low) * top).nan_to_num().round().clamp(self.lowest, top)
        above = torch.where(zero == top, 0, high / (top - zero))
        scale = torch.maximum(above, torch.where(zero == 0, 0, low / -zero))
        dtype = self.old.scale.dtype
        scale = scale.clamp(min=torch.finfo(dtype).smallest_normal).to(dtype).double()
        return self.nearest(w, scale, zero)


def awq_codes(x: Tensor) -> Tensor:  # (m, n) words -> (m, 8n)
    place = [0, 4, 1, 5, 2, 6, 3, 7]  # the nibble of each column of eight
    return bits_of(x, 4, 8 * x.shape[1]).view(len(x), -1, 8)[:, :, place].flatten(1)


def gptq_v1_zeros(words: Tensor, bits: int, out: int) -> Tensor:  # (groups, out)
    """Plus 1: of 3 bits each by itself, else of whole words, as gptqmodel does."""
    if bits == 3:
        return (bits_of(words, 3, out) + 1) % 8
    ones = sum(1 << shift for shift in range(0, 32, bits))
    return bits_of((words.long() + ones) % 2**32, bits, out)


def any_bytes(seed: int) -> Case:
    """Scales may be 0 or below, groups shuffled, short, or of any size."""
    generator = torch.Generator().manual_seed(seed)

    def pick(*choices):
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    def words(*shape: int) -> Tensor:
        return torch.randint(-(2**31), 2**31, shape, generator=generator).int()

    version, dtype = (
        pick(0, 1, 1, 2),
        pick(torch.float16, torch.float16, torch.bfloat16, torch.float32),
    )
    bits, size, each = pick(2, 3, 4, 8), 32 * pick(1, 2, 3, 5), pick(8, 16, 32, 64, 1000)
    out = pick(1, 5, 16, 33, 70)
    if version == 0:
        bits, out, each = 4, 8 * pick(1, 2, 7), pick(8, 16, 32)
    each = min(each, size)
    count = math.ceil(size / each)
    scale = torch.rand(count, out, generator=generator) * 10 ** pick(-3.0, -1.5, 0.5)
    scale[torch.rand(scale.shape, generator=generator) < 0.04] = 0
    scale[torch.rand(scale.shape, generator=generator) < 0.04] *= -1
    group = torch.arange(size) // each
    order = pick("plain", "shuffled", "any") if version else "plain"
    if order == "shuffled":
        group = group[torch.randperm(size, generator=generator)]
    elif order == "any":
        group = torch.randint(count, (size,), generator=generator)
    zeros, rows = words(count, math.ceil(out * bits / 32)), size * bits // 32
    if version == 0:
        zeros, rows = pick(zeros, None), size
    across = out // 8 if version == 0 else out
    old = WordTensors(words(rows, across), zeros, scale.to(dtype))
    keep_zeros, indexed = pick(True, False) or zeros is None, order != "plain" or size % each > 0
    return Case(old, bits, group, version, keep_zeros, indexed or pick(True, False))


def changed(case: Case, seed: int) -> tuple[Tensor, Tensor]:
    """A weight that in every fourth row or so is the stored one, and elsewhere is moved by a part
    of a step or by many; and which groups are the stored ones (out, groups)."""
    generator = torch.Generator().manual_seed(seed)
    value = case.decoded(case.old).float()
    count = case.old.scale.shape[0]
    size = 10 ** (3 * torch.rand(len(value), count, generator=generator) - 2)
    size[torch.rand(size.shape, generator=generator) < 0.3] = 0
    step = case.old.scale.T.abs().float().clamp(min=1e-3) * size
    return value + torch.randn(value.shape, generator=generator) * step[:, case.group], size == 0


def equal(one: WordTensors, other: WordTensors) -> bool:
    pairs = [(x, y) for x, y in zip(one, other, strict=True) if x is not None and y is not None]
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("seed", usual(range(200), range(12)))
def test_any_bytes_written_again(seed: int) -> None:
    case = any_bytes(seed)
    old, value = case.old, case.decoded(case.old).float()
    for draws in (None, Draws(seed)):  # every bit stays: codes under a scale of 0, and padding
        assert equal(case.requantized(value.clone(), draws), old)

    w, same = changed(case, seed)
    new = case.requantized(w.clone())
    for x, y in zip(new, old, strict=True):
        assert x is None or y is None or (x.is_contiguous() and x.shape == y.shape)
    result, (codes, zero) = case.decoded(new), case.opened(new)
    old_codes, old_zero = case.opened(old)
    # what no value of changes stays, and so do zeros that have to
    assert torch.equal(codes[same[:, case.group]], old_codes[same[:, case.group]])
    assert torch.equal(new.scale.T[same], old.scale.T[same])
    assert torch.equal(zero[same], old_zero[same])
    assert not case.keep_zeros or torch.equal(zero, old_zero)
    assert bool((zero[zero != old_zero] >= case.lowest).all()) and bool(new.scale.isfinite().all())
    # of both candidates the better
    lost, room = case.errors(result, w), 1e-6 * case.errors(torch.zeros_like(w), w)
    assert bool((lost <= case.errors(case.kept(w), w) * (1 + 1e-5) + 1e-3 * room).all())
    sizes = torch.bincount(case.group, minlength=len(old.scale))
    if len(old.scale) * int(sizes.max()) <= 2 * len(case.group):
        assert bool((lost <= case.errors(case.minmax(w), w) * (1 + 1e-5) + room).all())
    # rounding draws lie beside the value, with scales that a group had or has
    drawn = case.requantized(w.clone(), Draws(seed))
    step = drawn.scale.T.abs().double()[:, case.group]
    ends = case.nearest(w, drawn.scale.T.double(), case.opened(drawn)[1])
    near = (case.decoded(drawn) - ends).abs() <= step * 1.001
    assert bool(near.all())


@pytest.mark.parametrize("seed", range(4))
def test_rows_of_words_alone(seed: int) -> None:
    """Rows whose zeros fill words."""
    case = replace(any_bytes(seed), keep_zeros=False)
    case = next(c for c in (any_bytes(seed + 4 * n) for n in range(99)) if len(c.old.scale.T) == 70)
    w, _ = changed(case, seed)
    first = 32
    across = slice(first * case.bits // 32, None)
    assert case.old.zeros is not None
    lower = replace(
        case,
        old=WordTensors(
            case.old.words[:, first:], case.old.zeros[:, across], case.old.scale[:, first:]
        ),
    )
    for draws in (None, Draws(seed)):
        whole = case.requantized(w.clone(), draws)
        alone = lower.requantized(w[first:].clone(), draws and draws.at(first * w.shape[1]))
        assert whole.zeros is not None
        parts = WordTensors(whole.words[:, first:], whole.zeros[:, across], whole.scale[:, first:])
        assert equal(alone, parts)


def test_columns_round_as_the_weight_does() -> None:
    for seed in range(20):
        case = any_bytes(seed)
        if case.version == 0:
            continue
        w, _ = changed(case, seed)
        group = case.group.int() if case.indexed else None
        one = gptq_grid(case.old, case.bits, w.shape[1], group, case.version)
        columns = [one.round_column(x.contiguous(), i) for i, x in enumerate(w.T)]
        assert torch.allclose(torch.stack(columns, 1).double(), case.kept(w), rtol=1e-6, atol=0)

"""Splitting fused modules and fusing them again: the delta stays, the rank does not grow."""

from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adapterkit.adapters.formats.library import formats
from adapterkit.adapters.formats.modules.fusing import Fusion, fuse, split
from adapterkit.adapters.formats.modules.record import AdapterModule, Contents
from adapterkit.adapters.formats.modules.tensors import Expression, StoredTensor, stored
from adapterkit.adapters.formats.planning.lossy import with_biases
from adapterkit.adapters.formats.schema import NamingRule
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.errors import Refused

pytestmark = pytest.mark.quick
NAMES = ("to_q", "to_k", "to_v", "proj_mlp")
IN, UNIT = 5, 2  # columns of the weight, rows of one share


class Memory:
    """Stored tensors that are in memory."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._numbers = count()

    def put(self, value: Tensor) -> StoredTensor:
        """The expression of a new stored tensor."""
        key = f"tensor{next(self._numbers)}"
        self.tensors[key] = value
        return stored(TensorSpec(key, "F64", tuple(value.shape), "file", 0, value.numel() * 8))

    def tensor(self, spec: TensorSpec) -> Tensor:
        """The tensor, or the row of it that these bytes are."""
        whole = self.tensors[spec.key]
        return whole.flatten()[spec.start // 8 : spec.stop // 8].reshape(spec.shape)

    def again(self, module: AdapterModule) -> AdapterModule:
        """The module as another file holds it: the same bytes, nothing known of where from."""
        parts = {role: self.put(part.value(self).clone()) for role, part in module.parts.items()}
        return replace(module, parts=parts)

    def delta(self, module: AdapterModule) -> Tensor:
        """What it adds to the weight."""
        value = {role: part.value(self) for role, part in module.parts.items()}
        if module.kind == "lora":
            return module.scale * value["b"] @ value["a"]
        if module.kind == "loha":
            product = (value["w1_a"] @ value["w1_b"]) * (value["w2_a"] @ value["w2_b"])
            return module.scale * product
        if module.kind == "lokr":
            one, two = (
                value[w] if w in value else value[f"{w}_a"] @ value[f"{w}_b"] for w in ("w1", "w2")
            )
            return module.scale * torch.kron(one, two)
        return value["diff"] if module.kind == "full" else value["weight"]


@dataclass(frozen=True)
class Case:
    """Modules of a rule: `parts` by place, the whole's shares."""

    shares: tuple[int, ...]
    parts: dict[int, AdapterModule]
    memory: Memory

    @property
    def fusion(self) -> Fusion:
        return fusion(self.shares)

    def fused(self) -> AdapterModule:
        return self.memory.again(fuse(self.parts, "linear1", self.fusion, self.memory))

    def split(self, whole: AdapterModule) -> dict[int, AdapterModule]:
        parts = split(whole, NAMES[: len(self.shares)], self.fusion, self.memory)
        return {NAMES.index(part.name): self.memory.again(part) for part in parts}

    def delta(self, parts: dict[int, AdapterModule]) -> Tensor:
        """Of the whole, zeros where a part is missing."""
        return torch.cat(
            [
                self.memory.delta(parts[i])
                if i in parts
                else torch.zeros(share * UNIT, IN).double()
                for i, share in enumerate(self.shares)
            ]
        )


def fusion(shares: tuple[int, ...], steps: tuple[str, ...] = ()) -> Fusion:
    rule = NamingRule(NAMES[: len(shares)], {"original": "linear1"}, shares, {"original": steps})
    return Fusion(rule, "original")


def module(
    memory: Memory, kind: str, name: str, alpha: float, rank: int, **parts: Any
) -> AdapterModule:
    stored: dict[str, Expression] = {
        role: part if isinstance(part, Expression) else memory.put(part)
        for role, part in parts.items()
    }
    return AdapterModule("transformer", name, kind, stored, alpha, rank)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Parts of plain factors: some missing; ranks, scales, a's equal or not; columns of zeros."""
    memory = Memory()
    shares = draw(st.sampled_from([(1, 1), (1, 1, 1), (1, 1, 1, 4)]))
    places = draw(st.sets(st.sampled_from(range(len(shares))), min_size=1))
    torch.manual_seed(draw(st.integers(0, 1000)))
    shared = [torch.randn(rank, IN).double() for rank in (1, 2, 3)]
    parts = {}
    for place in sorted(places):
        rank = draw(st.integers(1, 3))
        is_shared = draw(st.booleans())
        a = shared[rank - 1].clone() if is_shared else torch.randn(rank, IN).double()
        b = torch.randn(shares[place] * UNIT, rank).double()
        if draw(st.booleans()):
            b[:, draw(st.integers(0, rank - 1))] = 0
        alpha = draw(st.sampled_from([1.0, 2.0, 0.3, float(rank)]))
        parts[place] = module(memory, "lora", NAMES[place], alpha, rank, a=a, b=b)
    return Case(shares, parts, memory)


@given(cases())
@settings(max_examples=150, deadline=None)
def test_delta_stays_and_rank_does_not_grow(case: Case) -> None:
    whole = case.fused()
    assert torch.allclose(case.memory.delta(whole), case.delta(case.parts), rtol=1e-13, atol=0)
    assert whole.rank <= sum(part.rank for part in case.parts.values())
    parts = case.split(whole)
    assert torch.allclose(case.delta(parts), case.delta(case.parts), rtol=1e-13, atol=0)
    again = Case(case.shares, parts, case.memory).fused()
    for role, part in whole.parts.items():
        value = again.parts[role].value(case.memory)
        assert torch.equal(value, part.value(case.memory)), role
    assert (again.rank, again.alpha) == (whole.rank, pytest.approx(whole.alpha, rel=1e-14))


@given(cases())
@settings(max_examples=100, deadline=None)
def test_split_gives_each_part_its_own_back(case: Case) -> None:
    """Of parts whose a's differ, and whose b's use all their columns."""
    whole = case.fused()
    for place, part in case.split(whole).items():
        if whole.rank == sum(one.rank for one in case.parts.values()) and all(
            (one.parts["b"].value(case.memory) != 0).all() for one in case.parts.values()
        ):
            assert part.rank == case.parts[place].rank
            assert torch.equal(
                part.parts["a"].value(case.memory), case.parts[place].parts["a"].value(case.memory)
            )


def qkv(memory: Memory, a: list[Tensor], alphas: tuple[float, ...] = (1, 1, 1)) -> Case:
    torch.manual_seed(1)
    parts = {
        i: module(memory, "lora", NAMES[i], alphas[i], len(one), a=one,
                  b=torch.randn(UNIT, len(one)).double())
        for i, one in enumerate(a)
    }  # fmt: skip
    return Case((1, 1, 1), parts, memory)


def test_equal_factors_stay_one() -> None:
    a = torch.randn(2, IN).double()
    case = qkv(Memory(), [a.clone() for _ in range(3)])
    assert case.fused().rank == 2
    assert {part.rank for part in case.split(case.fused()).values()} == {2}


def test_two_equal_factors_of_three_stay_one() -> None:
    a, other = torch.randn(2, IN).double(), torch.randn(1, IN).double()
    case = qkv(Memory(), [a, other, a.clone()])
    whole = case.fused()
    assert whole.rank == 3
    assert [part.rank for part in case.split(whole).values()] == [2, 1, 2]


def test_ratio_of_scales_goes_into_b() -> None:
    a = torch.randn(2, IN).double()
    case = qkv(Memory(), [a.clone() for _ in range(3)], alphas=(1, 2, 1))
    whole = case.fused()
    assert (whole.rank, whole.alpha) == (2, 1)
    b = whole.parts["b"].value(case.memory)
    assert torch.equal(b[UNIT : 2 * UNIT], 2 * case.parts[1].parts["b"].value(case.memory))


def test_block_diagonal_of_a_trainer() -> None:
    """sd-scripts' split_qkv: equal ranks, one alpha; an untrained part keeps its block."""
    memory = Memory()
    blocks = [torch.randn(UNIT, 2), torch.zeros(UNIT, 2), torch.randn(UNIT, 2)]
    b = torch.block_diag(*blocks).double()
    whole = module(memory, "lora", "qkv", 1.5, 6, a=torch.randn(6, IN).double(), b=b)
    case = Case((1, 1, 1), {}, memory)
    parts = case.split(whole)
    assert [(p.rank, p.alpha) for p in parts.values()] == [(2, 0.5)] * 3
    again = Case((1, 1, 1), parts, memory).fused()
    assert torch.equal(again.parts["b"].value(memory), b) and again.alpha == 1.5


def test_blocks_in_another_order_are_shared() -> None:
    """So that they are written again as they were."""
    memory = Memory()
    b = torch.zeros(2 * UNIT, 3).double()
    b[:UNIT, 1:] = b[UNIT:, :1] = 1
    whole = module(memory, "lora", "qkv", 1, 3, a=torch.randn(3, IN).double(), b=b)
    case = Case((1, 1), {}, memory)
    parts = case.split(whole)
    assert [part.rank for part in parts.values()] == [3, 3]
    assert torch.equal(Case((1, 1), parts, memory).fused().parts["b"].value(memory), b)


def test_scales_of_nothing() -> None:
    """A part that was switched off by its alpha."""
    case = qkv(Memory(), [torch.randn(1, IN).double() for _ in range(3)], alphas=(0, 2, 0))
    whole = case.fused()
    assert whole.scale == 2 and torch.equal(case.memory.delta(whole), case.delta(case.parts))
    nothing = qkv(Memory(), [torch.randn(1, IN).double() for _ in range(3)], alphas=(0, 0, 0))
    assert not nothing.memory.delta(nothing.fused()).any()


@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_biases_are_apart_or_together(scale: float) -> None:
    """scale · bias beside b is the difference diff_b of the layer's bias."""
    memory = Memory()
    bias, other = torch.randn(UNIT).double(), torch.randn(UNIT).double()
    factors = {"a": torch.randn(2, IN).double(), "b": torch.randn(UNIT, 2).double()}
    lora = module(memory, "lora", "to_q", 2 * scale, 2, **factors, bias=bias)
    lone = module(memory, "full", "to_k", 1, 1, diff_b=other)
    apart = with_biases(Contents("bfl", (), (lora, lone)), formats()["comfyui"]).modules
    assert [(m.name, m.kind) for m in apart] == [
        ("to_q", "lora"),
        ("to_q", "full"),
        ("to_k", "full"),
    ]
    assert torch.equal(apart[1].parts["diff_b"].value(memory), scale * bias)
    back = with_biases(Contents("comfyui", (), apart), formats()["bfl"]).modules
    assert [(m.name, m.kind) for m in back] == [("to_q", "lora"), ("to_k", "full")]
    assert torch.allclose(back[0].parts["bias"].value(memory), bias, rtol=1e-15)


def test_untrained_factors_are_shared() -> None:
    memory = Memory()
    a, b = torch.randn(6, IN).double(), torch.zeros(3 * UNIT, 6).double()
    parts = Case((1, 1, 1), {}, memory).split(module(memory, "lora", "qkv", 1, 6, a=a, b=b))
    assert [part.rank for part in parts.values()] == [6, 6, 6]


def test_halves_change_places() -> None:
    memory = Memory()
    b = torch.randn(8, 2).double()
    whole = module(memory, "lora", "norm", 2, 2, a=torch.randn(2, IN).double(), b=b)
    swapped = fusion((1,), ("swap_halves",))
    (part,) = split(whole, ["norm_out"], swapped, memory)
    assert torch.equal(part.parts["b"].value(memory), torch.cat([b[4:], b[:4]]))
    assert torch.equal(fuse({0: part}, "norm", swapped, memory).parts["b"].value(memory), b)


def test_magnitude_and_bias_are_rows() -> None:
    memory = Memory()
    a, rows = torch.randn(2, IN).double(), [torch.randn(UNIT).double() for _ in range(6)]
    parts = {
        i: module(memory, "lora", NAMES[i], 1 + i % 2, 2, a=a, b=torch.randn(UNIT, 2).double(),
                  magnitude=rows[i], bias=rows[3 + i])
        for i in range(3)
    }  # fmt: skip
    case = Case((1, 1, 1), parts, memory)
    whole = case.fused()
    assert torch.equal(whole.parts["magnitude"].value(memory), torch.cat(rows[:3]))
    biases = [rows[3], 2 * rows[4], rows[5]]
    assert torch.equal(whole.parts["bias"].value(memory), torch.cat(biases))
    assert torch.equal(case.split(whole)[2].parts["magnitude"].value(memory), rows[2])
    del parts[1]
    with pytest.raises(Refused, match="magnitude only in .*to_q.*to_v") as caught:
        case.fused()
    assert caught.value.hint == "choose another format"  # this one has a place for DoRA


def test_part_of_zeros_with_a_magnitude_stays() -> None:
    memory = Memory()
    b = torch.randn(3 * UNIT, 2).double()
    b[UNIT : 2 * UNIT] = 0
    whole = module(memory, "lora", "qkv", 1, 2, a=torch.randn(2, IN).double(), b=b,
                   magnitude=torch.randn(3 * UNIT).double())  # fmt: skip
    parts = Case((1, 1, 1), {}, memory).split(whole)
    assert sorted(parts) == [0, 1, 2]


def test_part_of_zeros_is_left_out() -> None:
    memory = Memory()
    b = torch.randn(3 * UNIT, 2).double()
    b[UNIT : 2 * UNIT] = 0
    whole = module(memory, "lora", "qkv", 1, 2, a=torch.randn(2, IN).double(), b=b)
    parts = Case((1, 1, 1), {}, memory).split(whole)
    assert sorted(parts) == [0, 2]
    assert torch.equal(Case((1, 1, 1), parts, memory).fused().parts["b"].value(memory), b)


@pytest.mark.parametrize("same", [True, False])
def test_hadamard_products_are_fused_exactly(same: bool) -> None:
    memory = Memory()
    torch.manual_seed(2)
    right = [torch.randn(2, IN).double() for _ in range(2)]
    parts = {}
    for i in range(3):
        w1_b, w2_b = right if same else (torch.randn(2, IN).double() for _ in range(2))
        w1_a, w2_a = (torch.randn(UNIT, 2).double() for _ in range(2))
        parts[i] = module(memory, "loha", NAMES[i], 1, 2,
                          w1_a=w1_a, w1_b=w1_b, w2_a=w2_a, w2_b=w2_b)  # fmt: skip
    case = Case((1, 1, 1), parts, memory)
    whole = case.fused()
    assert whole.rank == (2 if same else 6)
    assert torch.allclose(memory.delta(whole), case.delta(parts), rtol=1e-13)
    back = case.split(whole)
    assert [part.rank for part in back.values()] == [2, 2, 2]
    assert torch.allclose(case.delta(back), case.delta(parts), rtol=1e-13)


def test_kronecker_products_are_split_at_blocks() -> None:
    """Rows of w1, where a part is whole blocks of w2's; of w2, where w1 has one row."""
    memory = Memory()
    w1, w2_a, w2_b = (
        torch.randn(6, 1).double(),
        torch.randn(1, 2).double(),
        torch.randn(2, 5).double(),
    )
    whole = module(memory, "lokr", "qkv", 1, 2, w1=w1, w2_a=w2_a, w2_b=w2_b)
    case = Case((1, 1, 1), {}, memory)
    parts = case.split(whole)
    assert torch.equal(case.delta(parts), memory.delta(whole))
    assert parts[0].parts["w1"].shape == (2, 1)
    again = fuse(parts, "qkv", case.fusion, memory)
    assert torch.equal(again.parts["w1"].value(memory), w1)
    whole = module(memory, "lokr", "qkv", 1, 1, w1=w1[:1], w2=torch.randn(6, 5).double())
    parts = case.split(whole)
    assert torch.equal(case.delta(parts), memory.delta(whole))
    assert torch.equal(memory.delta(fuse(parts, "qkv", case.fusion, memory)), memory.delta(whole))


def test_kronecker_product_across_parts_is_refused() -> None:
    memory = Memory()
    whole = module(
        memory, "lokr", "qkv", 1, 1, w1=torch.randn(2, 1).double(), w2=torch.randn(3, 5).double()
    )
    with pytest.raises(Refused, match="come 3 at a time") as caught:
        Case((1, 1, 1), {}, memory).split(whole)
    assert "extract BASE MERGED" in caught.value.hint  # a rank is for whole modules of the model


def test_full_difference_with_a_missing_part() -> None:
    memory = Memory()
    diff = torch.randn(UNIT, IN).double()
    parts = {1: module(memory, "full", "to_k", 1, 1, diff=diff)}
    whole = fuse(parts, "qkv", fusion((1, 1, 1)), memory)
    assert torch.equal(memory.delta(whole)[UNIT : 2 * UNIT], diff)
    assert memory.delta(whole).count_nonzero() == diff.numel()


def test_value_with_a_missing_part_is_refused() -> None:
    memory = Memory()
    parts = {1: module(memory, "value", "to_k", 1, 1, weight=torch.randn(UNIT, IN).double())}
    with pytest.raises(Refused, match="weight only in .*to_k") as caught:
        fuse(parts, "qkv", fusion((1, 1, 1)), memory)
    assert caught.value.hint == "choose another format"


def test_parts_that_cannot_be_fused_are_refused() -> None:
    memory = Memory()
    factors = {"a": torch.randn(1, IN).double(), "b": torch.randn(UNIT, 1).double()}
    lora = module(memory, "lora", "to_q", 1, 1, **factors)
    wide = module(memory, "lora", "to_k", 1, 1, a=torch.randn(1, IN + 1).double(), b=factors["b"])
    long = module(memory, "lora", "to_k", 1, 1, a=factors["a"], b=torch.randn(3, 1).double())
    other = module(memory, "full", "to_k", 1, 1, diff=torch.randn(UNIT, IN).double())
    kron = [
        module(
            memory, "lokr", name, 1, 1, w1=torch.randn(2, 1).double(), w2=torch.randn(1, 5).double()
        )
        for name in NAMES[:2]
    ]
    oft = module(memory, "oft", "qkv", 1, 1, blocks=torch.randn(2, 3, 3).double())
    three = fusion((1, 1, 1))
    with pytest.raises(Refused, match="to_q.*lora.*to_k.*full") as caught:
        fuse({0: lora, 1: other}, "qkv", three, memory)
    assert caught.value.hint == "give --rank N to make LoRA factors of them"
    with pytest.raises(
        Refused, match="the parts have these rows: transformer.to_q 2, transformer.to_k 3"
    ):
        fuse({0: lora, 1: long}, "qkv", three, memory)
    with pytest.raises(
        Refused, match=r"inputs of transformer.to_q \(5,\), transformer.to_k \(6,\)"
    ):
        fuse({0: lora, 1: wide}, "qkv", three, memory)
    with pytest.raises(Refused, match="w2 is not the same"):
        fuse(dict(enumerate(kron)), "qkv", three, memory)
    with pytest.raises(Refused, match="oft with blocks") as caught:
        split(oft, NAMES[:3], three, memory)
    assert "extract BASE MERGED" in caught.value.hint
    with pytest.raises(Refused, match="oft with blocks") as caught:
        fuse({0: oft}, "qkv", three, memory)
    assert caught.value.hint == "give --base and --rank N to make LoRA factors of them"

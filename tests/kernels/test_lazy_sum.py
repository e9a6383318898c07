"""Products with a weight plus low-rank terms equal those with the sum, which is not computed."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
import transformers.integrations.moe  # noqa: F401  # registers an operator
from torch.utils._python_dispatch import TorchDispatchMode

from adapterkit.core.errors import Refused
from adapterkit.kernels.lazy_sum import LowRankSum, Term
from tests.support.card import DEVICE, Card, installed

pytestmark = pytest.mark.quick

E, N, M = 4, 16, 8
INDEX = torch.tensor([0, 3, 3, 1, 2, 0, 1])
ENDS = torch.tensor([2, 2, 5, 8], dtype=torch.int32)  # of four groups, one of them empty

# name -> axes of the sum, shape of x, function of both


def fallback(x, w, offs):
    return torch.ops.transformers.grouped_mm_fallback(x, w, offs)


grouped_mm = getattr(F, "grouped_mm", fallback)  # torch 2.7, the lowest, has none
PRODUCTS = {
    "linear": (2, (3, 5, M), lambda w, x: F.linear(x, w)),
    "linear of a vector": (2, (M,), lambda w, x: F.linear(x, w)),
    "linear of no rows": (2, (0, 3, M), lambda w, x: F.linear(x, w)),
    "linear with a bias": (2, (5, M), lambda w, x: F.linear(x, w, torch.ones(N, dtype=x.dtype))),
    "matmul": (2, (3, 5, N), lambda w, x: x @ w),
    "matmul of a vector": (2, (N,), lambda w, x: x @ w),
    "matmul from the left": (2, (M, 5), lambda w, x: w @ x),
    "rmatmul": (2, (M, 3), lambda w, x: x.__rmatmul__(w)),
    "T": (2, (5, M), lambda w, x: x @ w.T),
    "t": (2, (5, M), lambda w, x: x.mm(torch.t(w))),
    "addmm": (2, (5, N), lambda w, x: torch.addmm(torch.ones(M, dtype=x.dtype), x, w)),
    "rows": (2, (5, M), lambda w, x: F.linear(x, w[INDEX])),
    "cast": (2, (5, N), lambda w, x: x @ w.to(x.dtype).contiguous()),
    "experts as rows": (2, (3, 4), lambda w, x: sum(x @ e for e in w.view(E, -1, M))),
    "one expert as rows": (2, (3, M), lambda w, x: F.linear(x, w.reshape((E, -1, M))[INDEX[1]])),
    "transpose": (3, (E, 5, M), lambda w, x: torch.bmm(x, w.transpose(1, 2))),
    "permute": (3, (E, 5, M), lambda w, x: torch.bmm(x, w.permute(0, 2, 1))),
    "mT": (3, (E, 5, M), lambda w, x: x.bmm(w.mT)),
    "baddbmm": (3, (E, 5, N), lambda w, x: torch.baddbmm(torch.ones_like(x[:, :, :M]), x, w)),
    "one expert": (3, (5, M), lambda w, x: F.linear(x, w[INDEX[1]])),
    "experts by number": (3, (5, N), lambda w, x: x @ w[0] + x @ w[-1]),
    "experts in turn": (3, (5, M), lambda w, x: sum(F.linear(x, e) for e in w)),
    "an expert for each row": (3, (7, M), lambda w, x: torch.bmm(w[INDEX], x[:, :, None])),
    "the same, transposed": (3, (7, N), lambda w, x: torch.bmm(x[:, None], w[INDEX])),
    "several experts": (3, (2, 5, N), lambda w, x: x @ w[1:3]),
    "broadcast": (3, (5, N), lambda w, x: x @ w),
}
OTHERS = {
    "times": (2, (N, M), lambda w, x: w * x + x * w),
    "minus": (2, (1,), lambda w, x: 1 - w),
    "norm": (2, (N,), lambda w, x: x * w.norm(dim=1)),
    "einsum": (3, (5, N), lambda w, x: torch.einsum("bn,enm->ebm", x, w)),
    "stack": (2, (1,), lambda w, x: torch.stack([w, w])),
    "embedding": (2, (1,), lambda w, x: F.embedding(INDEX, w)),
    "a vector of experts": (3, (M,), lambda w, x: w @ x),
    "addmm times two": (2, (5, N), lambda w, x: torch.addmm(x[:, :M], x, w, alpha=2)),
    "other axes": (3, (1,), lambda w, x: w.transpose(0, 1) * x),
    "a mask": (3, (M, 2), lambda w, x: w[INDEX[:E] > 0] @ x),
    "columns": (3, (1,), lambda w, x: w[:, :, :3] * x),
    "flat": (2, (1,), lambda w, x: w.view(-1) * x),
}


def low_rank_sum(axes, dtype=torch.float64, factors=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def values(*shape):
        lead = (E,) if axes == 3 else ()
        return torch.randn(*lead, *shape, generator=generator, dtype=torch.float64)

    terms = [
        Term(
            values(N, rank).to(factors).requires_grad_(),
            values(rank, M).to(factors).requires_grad_(),
            scale,
        )
        for rank, scale in ((3, 0.7), (2, -0.3))
    ]
    return LowRankSum(values(N, M).to(dtype), terms)


def plain_sum(total):
    return total.weight + sum(t.scale * (t.left @ t.right) for t in total.terms)


@pytest.mark.parametrize("name", [*PRODUCTS, *OTHERS])
def test_values_and_gradients_are_those_of_the_sum(name):
    axes, shape, function = (PRODUCTS | OTHERS)[name]
    total = low_rank_sum(axes)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    variables = [x, *(factor for term in total.terms for factor in term[:2])]
    y, expected = function(total, x), function(plain_sum(total), x)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(y)
    torch.testing.assert_close(
        torch.autograd.grad(y, variables, grad, allow_unused=True, materialize_grads=True),
        torch.autograd.grad(expected, variables, grad, allow_unused=True, materialize_grads=True),
        rtol=1e-12,
        atol=1e-12,
    )
    assert total.is_read
    assert (total._value is not None) == (name in OTHERS)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("factors", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("function", [grouped_mm, fallback])
def test_grouped_products_of_odd_ranks_equal_dense_ones(function, dtype, factors, transposed):
    """Ranks 3 and 2 have to be padded: strides are multiples of 16 bytes."""
    total = low_rank_sum(3, dtype, factors)
    x = torch.randn(8, M if transposed else N).to(dtype).requires_grad_()
    w, sum_ = (t.transpose(-2, -1) if transposed else t for t in (total, plain_sum(total)))
    y = function(x, w, offs=ENDS)
    starts = [0, *ENDS.tolist()]
    expected = torch.cat([
        x[start:end].double() @ sum_[expert].double()
        for expert, (start, end) in enumerate(pairwise(starts))
    ])  # fmt: skip
    tolerance = 1e-5 if dtype == factors == torch.float32 else 0.1
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)
    variables = [x, *(factor for term in total.terms for factor in term[:2])]
    grad = torch.randn_like(y)
    for got, want in zip(
        torch.autograd.grad(y, variables, grad),
        torch.autograd.grad(expected, variables, grad.double()),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=10 * tolerance)
    assert y.dtype == dtype and total._value is None


def test_float32_factors_on_a_bfloat16_weight_keep_their_precision():
    """Summing in bfloat16, as PEFT does, loses a small delta; products factor by factor do not."""
    total = low_rank_sum(2, torch.bfloat16, torch.float32)
    small = LowRankSum(total.weight, [t._replace(scale=t.scale * 1e-3) for t in total.terms])
    x = torch.randn(64, N, generator=torch.Generator().manual_seed(1)).bfloat16()
    delta = sum(t.scale * (t.left.double() @ t.right.double()) for t in small.terms)
    exact = x.double() @ (small.weight.double() + delta)
    rounded = small.weight
    for left, right, scale in small.terms:
        rounded = rounded + scale * (left.bfloat16() @ right.bfloat16())
    ours, summed = ((y.double() - exact).norm() for y in (x @ small, x @ rounded))
    assert ours < summed


def test_eight_bit_weights_are_summed_within_their_range():
    total = low_rank_sum(2, torch.float8_e4m3fn, torch.float32)
    large = LowRankSum(total.weight, [t._replace(scale=1e4) for t in total.terms])
    value = large.value()
    assert value.dtype == torch.float8_e4m3fn
    assert value.float().isfinite().all()
    assert value.float().abs().max() == torch.finfo(torch.float8_e4m3fn).max


def test_products_under_autocast_are_bfloat16():
    total = low_rank_sum(2, torch.float32, torch.float32)
    x = torch.randn(5, N)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = x @ total
        value = total.value()
    assert y.dtype == torch.bfloat16 and value.dtype == torch.float32
    torch.testing.assert_close(value, plain_sum(total), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(y.float(), x @ plain_sum(total), rtol=0.05, atol=0.2)


@pytest.mark.skipif(grouped_mm is fallback, reason="needs torch's grouped_mm")
def test_grouped_products_on_a_gpu_are_of_the_weights_dtype():
    """CUDA has fast ones of bfloat16 alone; of float32 it would loop over the experts."""
    total, x = low_rank_sum(3, torch.bfloat16, torch.float32), torch.randn(8, N).bfloat16()
    halves = [Term(t.left.bfloat16(), t.right.bfloat16(), t.scale) for t in total.terms]
    with torch.no_grad():
        want = grouped_mm(x, LowRankSum(total.weight, halves), offs=ENDS)
        with installed(Card()) as card:
            terms = [Term(t.left.to(DEVICE), t.right.to(DEVICE), t.scale) for t in total.terms]
            there, ends = LowRankSum(total.weight.to(DEVICE), terms), ENDS.to(DEVICE)
            rows = x.to(DEVICE)
            card.waits = 0
            got = grouped_mm(rows, there, offs=ends)
            assert card.waits == 0
            assert torch.equal(got.cpu(), want)


def test_grouped_products_under_autocast_are_of_the_weights_dtype():
    total = low_rank_sum(3, torch.bfloat16, torch.float32)
    x = torch.randn(8, N).bfloat16()
    plain = grouped_mm(x, total, offs=ENDS)
    halves = [t._replace(left=t.left.bfloat16(), right=t.right.bfloat16()) for t in total.terms]
    want = grouped_mm(x, LowRankSum(total.weight, halves), offs=ENDS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = grouped_mm(x, total, offs=ENDS)
    assert torch.equal(got, want) and not torch.equal(got, plain)


class Sizes(TorchDispatchMode):
    """The largest tensor that an operator makes; views of the weight are none."""

    def __init__(self, weight):
        super().__init__()
        self.weight, self.largest = weight.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [
            r for r in torch.utils._pytree.tree_leaves(result) if isinstance(r, torch.Tensor)
        ]
        for tensor in tensors:
            if tensor.untyped_storage().data_ptr() != self.weight:
                self.largest = max(self.largest, tensor.numel())
        return result


@pytest.mark.parametrize("name", ["experts in turn", "experts as rows", "linear", "mT"])
def test_nothing_of_the_weights_size_is_made(name):
    axes, shape, function = PRODUCTS[name]
    total = low_rank_sum(axes)
    x = torch.randn(*shape[:-2], 2, shape[-1], dtype=torch.float64)
    with Sizes(total.weight) as sizes:
        function(total, x).sum().backward()
    assert sizes.largest < total.weight.numel()
    assert all(term.left.grad is not None for term in total.terms)


def test_metadata_needs_no_sum():
    total = low_rank_sum(3)
    assert total.shape == total.size() == torch.Size([E, N, M]) and len(total) == E
    assert (total.ndim, total.dim(), total.size(1)) == (3, 3, N)
    assert (total.dtype, total.device.type) == (torch.float64, "cpu")
    assert total.requires_grad and torch.is_floating_point(total)
    assert total._value is None
    with pytest.raises(AttributeError):
        _ = total.no_attribute_of_tensors


@pytest.mark.parametrize("change", [
    lambda w: w.mul_(2), lambda w: w.__setitem__(0, 1), torch.nn.init.zeros_,
    lambda w: torch.relu_(w),
])  # fmt: skip
def test_changes_in_place_are_refused(change):
    with pytest.raises(Refused, match="only reads"):
        change(low_rank_sum(2))

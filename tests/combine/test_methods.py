"""Every combination method of the registry: the laws of its family, and its plain dense reference
in float64.

A new method comes under the laws by itself; its reference is one function more in
support/method_references.py.
"""

import dataclasses
import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from adapterkit.core import registry
from adapterkit.core.errors import Refused
from adapterkit.kernels import elementwise
from adapterkit.kernels.lowrank.algebra import Product
from adapterkit.verbs.combine.methods.protocol import OnFactors
from tests.support.method_references import REFERENCES, VARIANTS, elected, refers, share_of, trimmed
from tests.support.methods import (
    HARD,
    METHODS,
    NOT_ITSELF,
    ON_ELEMENTS,
    WEIGHTS,
    Dense,
    applied,
    case,
    combined,
    product,
    record,
    seeds,
)
from tests.support.usual import usual

# What a method does not promise. Everything else is held to every law.
ORDERED = {"ema", "slerp"}  # the order of the adapters is part of the question
SHARES = {"mean", "karcher", "regmean", "regspan"}  # all weights times two: the same result
# at density 1, Σ shareᵢ Δᵢ
LINEAR = {"linear", "mean", "magnitude_prune", "dare_linear", "breadcrumbs", "gta"}
ADDITIVE = LINEAR - {"mean"} | {"ema"}  # at density 1, linear in each delta
PARENTS = {
    "magnitude_prune": "linear",
    "dare_linear": "linear",
    "breadcrumbs": "linear",
    "dare_ties": "ties",
    "della": "ties",
    "gta": "linear",
}


pytestmark = [pytest.mark.quick, pytest.mark.usefixtures("one_thread")]


# each has a case that is kept: of one row or column, of zeros, of full rank, of bf16
LIKE_OTHERS = ("1x3", "3x1", "zero and one", "full rank", "bf16")


@pytest.mark.parametrize("hard", usual(HARD, lambda hard: hard not in LIKE_OTHERS))
@pytest.mark.parametrize("name", REFERENCES)
def test_every_method_equals_its_reference(name: str, hard: str) -> None:
    products = HARD[hard]
    for options in VARIANTS:
        refers(name, options, products, WEIGHTS[: len(products)])
        refers(name, options, products, [1.0] * len(products))
        if name != "karcher":
            refers(name, options, products, [-0.5, 2.0, 1.0, -1.0][: len(products)])


@pytest.mark.parametrize("name", REFERENCES)
def test_reference_on_something_larger(name: str) -> None:
    products = [product(96, 130, rank, rank) for rank in (3, 16)]
    refers(name, {"density": 0.2}, products, [0.8, 0.5], height=32)
    refers(name, {"share": 0.05}, products, [1.0, 1.0], height=32)


# Laws, for every member.


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_frozen_record_with_its_source(name: str) -> None:
    kind = METHODS[name]
    assert dataclasses.is_dataclass(kind) and kind.__dataclass_params__.frozen
    assert (
        kind.name == name
        and kind.__module__.rsplit(".", 1)[1] == name
        and ("arXiv:" in kind.source or "doi:" in kind.source)
    )
    assert "=" in kind.__doc__.splitlines()[0]


@pytest.mark.parametrize("name", METHODS)
def test_a_method_has_only_the_function_that_it_declares(name: str) -> None:
    """It is declared beside the name, and the method has the function for it, and that one
    alone."""
    kind = METHODS[name]
    functions = {
        "factors": "combine_factors",
        "covariances": "combine_covariances",
        "elements": "combine_elements",
    }
    assert {"name", "source", "acts_on"} <= vars(kind).keys()
    assert [key for key, value in functions.items() if hasattr(kind, value)] == [kind.acts_on]
    assert not getattr(kind, "__abstractmethods__", None)
    assert not {"name", "source", "acts_on"} & registry.options(kind).keys(), "not an option"


def test_an_unfinished_method_cannot_be_made() -> None:
    @dataclasses.dataclass(frozen=True)
    class Unfinished(OnFactors):
        name = "unfinished"
        source = "none"
        acts_on = "factors"

    with pytest.raises(TypeError, match="abstract"):
        Unfinished()


@pytest.mark.parametrize("name", METHODS)
def test_one_weight_for_each_delta(name: str) -> None:
    for weights in ([1.0], [1.0, 1.0, 1.0]):
        with pytest.raises(ValueError):
            combined(record(name), HARD["pair"], weights)


@pytest.mark.parametrize("name", METHODS)
def test_same_inputs_same_bytes_and_inputs_untouched(name: str) -> None:
    products = HARD["pair"]
    before = [p.left.clone() for p in products] + [p.right.clone() for p in products]
    one, two = (combined(record(name), products, [0.7, 1.6]) for _ in range(2))
    assert torch.equal(one, two) and one.any()
    assert all(map(torch.equal, before, [p.left for p in products] + [p.right for p in products]))


@pytest.mark.parametrize("name", METHODS)
def test_facts_are_finite_numbers(name: str) -> None:
    for products in (HARD["pair"], case(4, 5, (2, "zero"), (2, "zero"))):
        result, metrics = applied(record(name), products, [1.0, 1.0])
        assert all(isinstance(value, float) and math.isfinite(value) for value in metrics.values())
        if not isinstance(result, Product):
            assert result.dtype == torch.float32 and result.shape == products[0].dense().shape
        else:
            assert result.left.dtype == torch.float64 and result.rank <= sum(
                p.rank for p in products
            )


@pytest.mark.parametrize("name", METHODS)
def test_order_of_adapters(name: str) -> None:
    products = HARD["pair"] if name == "slerp" else HARD["full rank"]
    weights = WEIGHTS[: len(products)]
    order = list(range(len(products)))[::-1]
    moved = combined(
        record(name),
        [products[i] for i in order],
        [weights[i] for i in order],
        lambda i: seeds(order[i]),
    )
    if name in ORDERED:
        assert not torch.allclose(combined(record(name), products, weights[::-1]), moved)
    else:
        torch.testing.assert_close(
            moved, combined(record(name), products, weights), rtol=1e-6, atol=1e-6
        )


def test_slerp_the_other_way_round() -> None:
    one, two = HARD["pair"]
    torch.testing.assert_close(
        combined(record("slerp"), [one, two], [1, 2]), combined(record("slerp"), [two, one], [2, 1])
    )


def test_slerp_s_weights_say_where_on_the_arc() -> None:
    one, two = HARD["pair"]
    for t in (0.0, 0.25, 0.5, 1.0):
        text = combined(record("slerp", t=t), [one, two], [1, 1])
        torch.testing.assert_close(text, combined(record("slerp"), [one, two], [1 - t, t]))
        torch.testing.assert_close(
            3 * text, combined(record("slerp"), [one, two], [3 * (1 - t), 3 * t])
        )
    assert not torch.allclose(
        combined(record("slerp", t=0.25), [one, two], [1, 1]),
        0.75 * one.dense() + 0.25 * two.dense(),
    )
    for weights in ([0.5, 1], [1, -1], [0, 1]):
        with pytest.raises(Refused, match="both are the position on the arc"):
            combined(record("slerp", t=0.25), [one, two], weights)


@pytest.mark.parametrize("name", METHODS)
def test_all_weights_doubled(name: str) -> None:
    products = HARD["pair"]
    one, two = (combined(record(name), products, [0.7 * by, 1.6 * by]) for by in (1, 2))
    torch.testing.assert_close(two, one if name in SHARES else 2 * one)


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"slerp"}))
def test_one_adapter_is_itself(name: str) -> None:
    products = [HARD["pair"][0]]
    result = combined(record(name, density=1), products, [1.0])
    assert torch.allclose(result, products[0].dense(), atol=1e-6) == (name not in NOT_ITSELF)


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"slerp"}))
def test_below_density_one_even_one_adapter_changes(name: str) -> None:
    """So weights (1, 0) give the first adapter's delta by all methods but these and iso_c."""
    products, drops = [HARD["pair"][0]], "density" in registry.options(METHODS[name])
    result = combined(record(name, density=0.2), products, [1.0])
    is_itself = torch.allclose(result, products[0].dense(), rtol=0.01)
    assert is_itself == (name not in NOT_ITSELF and not drops)


@pytest.mark.parametrize(
    "name", sorted(LINEAR & set(METHODS) | {"slerp", "karcher", "regmean", "regspan"})
)  # of all: see test_combine
def test_weights_one_and_zero(name: str) -> None:
    products = HARD["pair"]
    torch.testing.assert_close(
        combined(record(name, density=1), products, [1.0, 0.0]),
        products[0].dense(),
        rtol=1e-6,
        atol=1e-6,
    )


@pytest.mark.parametrize("name", sorted(ADDITIVE & set(METHODS)))
def test_linear_in_the_first_delta(name: str) -> None:
    one, two, three = (product(6, 8, 2, seed) for seed in (1, 2, 3))
    both = Product(torch.cat([one.left, two.left], 1), torch.cat([one.right, two.right], 0))
    none = Product(three.left * 0, three.right)
    method = record(name, density=1)
    parts = combined(method, [one, three], [0.5, 2.0]) + combined(method, [two, none], [0.5, 2.0])
    torch.testing.assert_close(
        combined(method, [both, three], [0.5, 2.0]), parts, rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("name", PARENTS)
def test_density_one_is_the_dense_parent(name: str) -> None:
    for products in (HARD["full rank"], HARD["repeated"], HARD["1x3"]):
        for majority in ("total", "frequency"):
            actual = combined(
                record(name, density=1, majority=majority), products, [0.7, -1.6, 0.4]
            )
            parent = combined(
                record(PARENTS[name], density=1, majority=majority), products, [0.7, -1.6, 0.4]
            )
            torch.testing.assert_close(actual, parent, rtol=1e-6, atol=1e-6)


def test_ties_at_density_one_is_untrimmed() -> None:
    deltas = [p.dense().float().double() for p in HARD["repeated"]]
    expected = elected(deltas, WEIGHTS[:3], None)
    torch.testing.assert_close(
        combined(record("ties", density=1.0), HARD["repeated"], WEIGHTS[:3]),
        expected,
        rtol=0,
        atol=1e-6,
    )


@pytest.mark.parametrize("name", ON_ELEMENTS)
def test_blocks_and_threads_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elementwise, "CACHED", 700)
    products = [
        product(100, 401, 8, seed, kind)
        for seed, kind in ((1, "normal"), (2, "bf16"), (3, "normal"))
    ]
    observed = []
    for number, height in ((1, 100), (2, 100), (5, 100), (2, 17), (1, 9)):
        torch.set_num_threads(number)
        observed.append(combined(record(name, density=0.3), products, WEIGHTS[:3], height=height))
    assert all(torch.equal(observed[0], other) for other in observed[1:])


class Live(TorchDispatchMode):
    """Where in memory matrices of at least half the size of the result were made."""

    def __init__(self, size: int):
        super().__init__()
        self.size, self.places = size, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, Tensor) and value.untyped_storage().nbytes() >= 2 * self.size:
                self.places.add(value.untyped_storage().data_ptr())
        return result


@pytest.mark.parametrize("name", ON_ELEMENTS)
def test_methods_on_elements_stay_within_their_memory(name: str) -> None:
    deltas = Dense([product(1024, 1024, 4, seed).dense() for seed in (1, 2)], height=16)
    with Live(1024 * 1024) as live:
        record(name, density=0.2, select=0.2).combine_elements(deltas, [1.0, 1.0], seeds)
    assert len(live.places - {m.untyped_storage().data_ptr() for m in deltas.matrices}) == 1, (
        "only the result may be of the size of the matrix"
    )


@pytest.mark.parametrize("products", [HARD["pair"], HARD["repeated"]])
@pytest.mark.parametrize("name", ["ties", "dare_ties", "della", "sce", "knots"])
def test_the_conflict_metric_equals_a_count_by_hand(name: str, products: list[Product]) -> None:
    """The metric agrees with a count by hand for ties at density 1, and is a share for the
    others."""
    weights = [1.0] * len(products)
    if name == "knots":
        metrics = record(name).combine_factors(products, weights, seeds)[1]
    else:
        metrics = (
            record(name)
            .combine_elements(Dense([p.dense() for p in products]), weights, seeds)
            .metrics
        )
    assert 0 <= metrics["conflict"] <= 1
    if name == "ties":
        for density, majority in itertools.product((1.0, 0.5), ("total", "frequency")):
            deltas = [p.dense().float() for p in products]
            kept = torch.stack([trimmed(d, share_of(d, density)) for d in deltas])
            plus, minus = (kept > 0).sum(0), (kept < 0).sum(0)
            several = int((plus + minus >= 2).sum())
            metrics = (
                record("ties", density=density, majority=majority)
                .combine_elements(Dense(deltas), weights, seeds)
                .metrics
            )
            assert metrics["conflict"] == int(((plus > 0) & (minus > 0)).sum()) / several > 0

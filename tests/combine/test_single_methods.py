"""Combination methods: bad options and refusals, and what is special to one of them."""

import math

import pytest
import torch

from adapterkit.core import registry
from adapterkit.core.errors import Refused
from adapterkit.kernels.lowrank.algebra import Product
from tests.support.method_references import refers
from tests.support.methods import HARD, METHODS, applied, combined, product, record

pytestmark = [pytest.mark.quick, pytest.mark.usefixtures("one_thread")]


BAD = {
    "density": [-0.1, 1.1, math.nan],
    "gamma": [-0.1, 1.5],
    "epsilon": [-0.1, 0.4, 0.9],
    "select": [-0.1, 2.0],
    "decay": [-0.1, 1.1],
    "t": [-0.1, 1.1],
    "share": [0.0, 1.1],
    "beta": [-0.1, 1.1, math.nan],
    "common": [-0.1, 1.1],
    "inner": ["linear", "sce", "none"],
    "dimensions": [0, -1],
}


@pytest.mark.parametrize(
    ("name", "option"),
    [(name, option) for name in METHODS for option in registry.options(METHODS[name])],
)
def test_invalid_settings_of_methods_are_refused(name: str, option: str) -> None:
    for value in BAD.get(option, []):
        with pytest.raises(Refused, match=registry.as_flag(option)):
            record(name, **{"density": 0.4, "prune": "ranks", option: value})


@pytest.mark.parametrize("name", [n for n in METHODS if "majority" in registry.options(METHODS[n])])
def test_an_unknown_majority(name: str) -> None:
    with pytest.raises(Refused, match="--majority"):
        registry.create("combinations", name, {"density": 0.4, "majority": "most"})


def test_della_names_a_valid_epsilon() -> None:
    with pytest.raises(Refused, match="below 0.1"):
        record("della", density=0.9, epsilon=0.15)
    record("della", density=1.0, epsilon=0.15), record("della", density=0.75, epsilon=0.25)


def test_refusals_of_factors() -> None:
    one, two, three = HARD["full rank"]
    minus = Product(-one.left * 3, one.right)
    for name in ("slerp", "karcher"):
        with pytest.raises(Refused, match="opposite directions"):
            combined(record(name), [one, minus], [1.0, 1.0])
    with pytest.raises(Refused, match="adapters 1 and 3 in opposite"):
        combined(record("karcher"), [one, two, minus], [1.0, 1.0, 1.0])
    (
        combined(record("slerp"), [one, minus], [1.0, -1.0]),
        combined(record("karcher"), [one, two, minus], [1.0, 1.0, 0.0]),
    )
    with pytest.raises(Refused, match="two"):
        combined(record("slerp"), [one, two, three], [1.0, 1.0, 1.0])
    with pytest.raises(Refused, match="add up to 0"):
        combined(record("mean"), [one, two], [1.0, -1.0])
    for weights in ([1.0, -0.5], [0.0, 0.0]):
        with pytest.raises(Refused, match="shares"):
            combined(record("karcher"), [one, two], weights)


def test_karcher_of_balanced_directions_is_refused() -> None:
    """Three vectors at 120°: no two are opposite, and yet there is no mean."""
    turns = [2 * math.pi * i / 3 for i in range(3)]
    products = [
        Product(
            torch.tensor([[math.cos(a)], [math.sin(a)]], dtype=torch.float64),
            torch.ones(1, 1).double(),
        )
        for a in turns
    ]
    with pytest.raises(Refused, match="cancel"):
        combined(record("karcher"), products, [1.0, 1.0, 1.0])


def test_karcher_is_where_the_pulls_balance() -> None:
    products = [product(30, 20, 4, seed) for seed in range(6)]
    weights = [1.0, 2.0, 0.5, 1.0, 3.0, 1.0]
    result = combined(record("karcher"), products, weights)
    u, pull = result / result.norm(), torch.zeros(30, 20, dtype=torch.float64)
    for w, p in zip(weights, products, strict=True):
        x = p.dense() / p.dense().norm()
        angle = torch.acos((x * u).sum())
        pull += w * angle / angle.sin() * (x - angle.cos() * u)
    assert float(pull.norm()) < 1e-8
    assert float(result.norm()) == pytest.approx(
        sum(w * float(p.dense().norm()) for w, p in zip(weights, products, strict=True)) / 8.5
    )


SAME = ["mean", "karcher", "slerp", "tsv", "ties", "sce", "knots", "core_space", "ctm", "svc"]


@pytest.mark.parametrize("name", SAME)
def test_a_delta_with_itself(name: str) -> None:
    one = product(12, 9, 3, 4)
    weights = [0.5, 0.5] if name == "slerp" else [1.0, 1.0]
    result = combined(record(name, density=1, select=0.5), [one, one], weights)
    torch.testing.assert_close(result, one.dense(), rtol=1e-5, atol=1e-6)


def test_slerp_of_nearly_parallel_deltas_is_accurate() -> None:
    """Angles far below the square root of float64's noise do no harm."""
    one, other = product(12, 9, 3, 4), product(12, 9, 3, 5)
    for tiny in (1e-5, 1e-8, 1e-11):
        near = Product(
            torch.cat([one.left, tiny * other.left], 1), torch.cat([one.right, other.right], 0)
        )
        for name in ("karcher", "slerp"):
            measured = combined(record(name), [one, near], [0.5, 0.5])
            torch.testing.assert_close(
                measured, (one.dense() + near.dense()) / 2, rtol=0, atol=1e-9 + tiny**2
            )


def test_slerp_of_a_small_angle() -> None:
    one, other = product(12, 9, 3, 4), product(12, 9, 3, 5)
    near = Product(
        torch.cat([one.left, 0.03 * other.left], 1), torch.cat([one.right, other.right], 0)
    )
    refers("slerp", {}, [one, near], [1.0, 3.0])


def test_iso_c_is_isotropic_and_tsv_is_orthogonal() -> None:
    products = [product(30, 20, 3, seed) for seed in (1, 2)]
    actual = torch.linalg.svdvals(combined(record("iso_c"), products, [1.0, 1.0]))
    assert float(actual[5]) == pytest.approx(float(actual[0])) and float(actual[6]) < 1e-12
    strengths = (
        torch.cat([torch.linalg.svdvals(p.dense())[:3] for p in products])
        .sort(descending=True)
        .values
    )
    torch.testing.assert_close(
        torch.linalg.svdvals(combined(record("tsv"), products, [1.0, 1.0]))[:6], strengths
    )
    energy = applied(record("tsv", share=0.05), products, [1.0, 1.0])[1]["kept_energy"]
    kept = [torch.linalg.svdvals(p.dense()).square() for p in products]
    assert energy == pytest.approx(
        sum(float(s[0]) for s in kept) / sum(float(s.sum()) for s in kept)
    )


HALVED = ("iso_c", "iso_cts", "subspace_boost")


@pytest.mark.parametrize("name", ["tsv", "knots", "ctm", "svc", *HALVED])
def test_noise_is_not_a_direction(name: str) -> None:
    """The same delta twice in other factors: the second half of the rank is rounding, and must stay
    out."""
    one = product(12, 9, 3, 4)
    mixed = torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    same = Product(one.left @ mixed, torch.linalg.solve(mixed, one.right))
    expected = combined(record(name, density=1), [one], [1.0])
    measured = combined(
        record(name, density=1), [one, same], [0.5, 0.5] if name in HALVED else [1.0, 1.0]
    )
    torch.testing.assert_close(measured, expected, rtol=0, atol=1e-9)


def test_sce_weighs_small_deltas_too() -> None:
    """Mean squares far below 1e-6, as those of most adapters: the shares are still those of the
    squares."""
    one, two = HARD["pair"]
    small = [Product(p.left * 1e-6, p.right) for p in (one, two)]
    for select in (0.5, 1.0):
        method = record("sce", select=select)
        torch.testing.assert_close(
            combined(method, small, [1, 1]) * 1e6,
            combined(method, [one, two], [1, 1]),
            rtol=1e-5,
            atol=1e-6,
        )


def test_core_space_of_orthogonal_inputs_is_ties_in_their_coordinates() -> None:
    """Disjoint rows of the identity as a and b: the cores are the deltas' own elements."""
    eye = torch.eye(9, dtype=torch.float64)
    mixed = [product(2, 2, 2, seed).dense() * size for seed, size in ((1, 1.0), (2, 3.0))]
    products = [
        Product(eye[:, at : at + 2] @ m, eye[at : at + 2])
        for at, m in zip((0, 4), mixed, strict=True)
    ]
    torch.testing.assert_close(
        combined(record("core_space", density=1), products, [1.0, 0.5]),
        products[0].dense() + 0.5 * products[1].dense(),
    )


@pytest.mark.parametrize("inner", ["magnitude_prune", "breadcrumbs", "dare_linear"])
@pytest.mark.parametrize("name", ["core_space", "knots"])
def test_a_linear_method_inside_lossless_bases_is_the_sum(name: str, inner: str) -> None:
    products = HARD["full rank"]
    expected = sum(w * p.dense() for w, p in zip([0.7, -1.0, 2.0], products, strict=True))
    actual = combined(record(name, density=1, inner=inner), products, [0.7, -1.0, 2.0])
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("beta", [0.0, 0.25, 1.0])
def test_ctm_has_its_rank_and_its_bases_cannot_be_bettered(beta: float) -> None:
    """A rank below the deltas'; small turns of either basis keep no more of the targets."""
    products = [product(30, 20, 4, seed) for seed in range(3)]
    products[0] = Product(10 * products[0].left, products[0].right)
    method = record("ctm", density=1, beta=beta, dimensions=3)
    u, v = method.bases(products)
    assert torch.linalg.matrix_rank(combined(method, products, [1.0] * 3)) == 3
    norms = [float(p.dense().norm()) for p in products]
    targets = [
        p.dense() * (beta + (1 - beta) * sum(norms) / 3 / n)
        for p, n in zip(products, norms, strict=True)
    ]
    kept = lambda u, v: sum(float((u.T @ t @ v.T).square().sum()) for t in targets)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        turned = u + 0.01 * torch.randn(u.shape, generator=generator, dtype=u.dtype)
        assert kept(torch.linalg.qr(turned)[0], v) < kept(u, v)
        turned = v.T + 0.01 * torch.randn(v.T.shape, generator=generator, dtype=v.dtype)
        assert kept(u, torch.linalg.qr(turned)[0].T) < kept(u, v)


def test_pico_damps_what_is_shared_and_keeps_the_mean_norm() -> None:
    shared, own = product(20, 15, 1, 1), [product(20, 15, 1, seed) for seed in (2, 3, 4)]
    products = [
        Product(torch.cat([5 * shared.left, o.left], 1), torch.cat([o.right, shared.right], 0))
        for o in own
    ]
    result = combined(record("pico"), products, [1.0] * 3)
    plain = sum(p.dense() for p in products)
    along = shared.left[:, 0] / shared.left.norm()
    rest = lambda x: float((x - along[:, None] * (along @ x)).norm() / (along @ x).norm())
    assert rest(result) > 2 * rest(plain)
    mean = sum(float(p.dense().norm()) for p in products) / 3
    assert float(result.norm()) == pytest.approx(mean)
    assert applied(record("pico"), products, [1.0] * 3)[1]["damping"] < 0.5


def test_svc_at_one_never_strengthens_a_direction() -> None:
    products = HARD["full rank"]
    plain = torch.linalg.svdvals(sum(p.dense() for p in products))
    for alpha, grows in ((1.0, False), (None, True)):
        actual = combined(record("svc", alpha=alpha), products, [1.0] * 3)
        u, s, _ = torch.linalg.svd(sum(p.dense() for p in products), full_matrices=False)
        strengths = torch.stack([(column @ actual).norm() for column in u.T])
        assert bool((strengths > s + 1e-9).any()) == grows
    assert len(plain) == 5


def test_subspace_boost_between_the_sum_and_iso() -> None:
    products, weights = HARD["pair"], [1.0, 0.5]
    plain = sum(w * p.dense() for w, p in zip(weights, products, strict=True))
    torch.testing.assert_close(
        combined(record("subspace_boost", beta=1.0), products, weights), plain
    )
    values = torch.linalg.svdvals(combined(record("subspace_boost", beta=0.0), products, weights))
    torch.testing.assert_close(values[:7], torch.linalg.svdvals(plain)[:1].expand(7))
    assert float(values[7]) < 1e-12


def test_iso_cts_with_all_in_common_is_iso_c() -> None:
    products, weights = HARD["pair"], [1.0, 0.5]
    torch.testing.assert_close(
        combined(record("iso_cts", common=1.0), products, weights),
        combined(record("iso_c"), products, weights),
    )
    for common in (0.0, 0.4):
        result = combined(record("iso_cts", common=common), products, weights)
        values = torch.linalg.svdvals(result)
        torch.testing.assert_close(values[:7], values[:1].expand(7))

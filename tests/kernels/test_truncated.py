"""Truncated decompositions against LAPACK's in float64: the optimum for every kind of spectrum,
shape and scale, on every path."""

import functools
import math

import pytest
import torch
from torch import Tensor

from adapterkit.kernels.lowrank import krylov, truncated
from adapterkit.kernels.lowrank.algebra import Svd
from adapterkit.kernels.lowrank.truncated import svd_for_energy, svd_for_ratio, truncated_svd
from tests.support.usual import usual

pytestmark = [pytest.mark.quick, pytest.mark.usefixtures("one_thread")]


def gaussian(n: int, m: int, seed: int = 0) -> Tensor:
    return torch.randn(n, m, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spectrum(n: int, m: int, values: Tensor, seed: int = 0) -> Tensor:
    """A matrix (n, m) float64 with these singular values."""
    k = len(values)
    u, v = torch.linalg.qr(gaussian(n, k, seed)).Q, torch.linalg.qr(gaussian(m, k, seed + 1)).Q
    return u * values.double() @ v.T


def counting(size: int) -> Tensor:
    return torch.arange(1, size + 1, dtype=torch.float64)


def trimmed(n: int, m: int) -> Tensor:
    """The sum of three products of rank 5 without the smaller 80 % of its elements."""
    w = sum(
        (gaussian(n, 5, i) @ gaussian(5, m, 10 + i) for i in range(3)),
        torch.zeros(n, m, dtype=torch.float64),
    )
    return torch.where(w.abs() > w.abs().flatten().quantile(0.8), w, 0)


def check(
    w: Tensor,
    actual: Svd,
    k: int,
    factor: float = 1e-5,
    exact: Tensor | None = None,
    values: float = 1e-6,
) -> None:
    """Shapes, order, orthonormality, the values, and the error of the rank-k approximation next to
    the optimal one.

    The factor cannot hold where the optimal error is below what vectors rounded to float32 lose,
    1e-6 of the norm.
    """
    n, m = w.shape
    single = w.dtype == torch.float32
    assert (actual.u.shape, actual.s.shape, actual.vh.shape) == ((n, k), (k,), (k, m))
    assert {actual.u.dtype, actual.s.dtype, actual.vh.dtype} == {w.dtype}
    exact = torch.linalg.svdvals(w.double()) if exact is None else exact
    u, s, vh = (part.double() for part in actual)
    assert bool((s[:-1] >= s[1:]).all()) and float(s[-1]) >= 0
    assert float((s - exact[:k]).abs().max()) <= values * float(exact[0])
    for rows in (u.T, vh):
        assert float((rows @ rows.T - torch.eye(k)).abs().max()) <= (1e-5 if single else 1e-12)
    unit = float(exact[0]) or 1.0
    whole, best = (float((part / unit).norm()) for part in (exact, exact[k:]))
    error = float((w.double() / unit - u * (s / unit) @ vh).norm())
    assert error <= best * (1 + factor) + whole * (1e-6 if single else 1e-9)


@pytest.fixture
def iterated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The iteration at any size and cost; a full decomposition is an error."""
    monkeypatch.setattr(truncated, "SMALL_SIDE", 0)
    monkeypatch.setattr(truncated, "_full_cost", lambda *_: math.inf)
    monkeypatch.setattr(truncated, "_full", lambda *_: pytest.fail("decomposed in full"))


ITERATED = {
    "inverse": lambda: spectrum(300, 700, 1 / counting(300)),
    "root": lambda: spectrum(400, 500, counting(400) ** -0.5),
    "exponential": lambda: spectrum(700, 300, torch.exp(-counting(300) / 4)),
    "trimmed": lambda: trimmed(400, 600),
    "rank deficient": lambda: spectrum(300, 400, counting(3)),
    "repeated": lambda: spectrum(
        300, 400, torch.cat([torch.full((30,), 2.0), torch.full((270,), 0.5)])
    ),
    "clustered": lambda: spectrum(
        300, 400, torch.cat([1 + counting(12) * 1e-5, 0.1 / counting(288)])
    ),
    "steps": lambda: spectrum(300, 400, torch.tensor([10.0] * 3 + [5.0] * 3 + [1.0] * 200)),
    "orthogonal": lambda: torch.linalg.qr(gaussian(300, 300)).Q,
    "zeros": lambda: torch.zeros(300, 400, dtype=torch.float64),
    "one element": lambda: torch.nn.functional.pad(
        torch.ones(1, 1, dtype=torch.float64), (299, 0, 0, 299)
    ),
    "outlier": lambda: spectrum(300, 400, torch.cat([torch.tensor([3e4]), counting(299) ** -0.5])),
}


@functools.cache
def example(name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The matrix and all of its singular values."""
    w = ITERATED[name]().to(dtype)
    return w, torch.linalg.svdvals(w.double())


@functools.cache
def vectors(name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """All of its singular vectors."""
    u, _, vh = torch.linalg.svd(example(name, dtype)[0].double(), full_matrices=False)
    return u, vh


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [1, 5])
@pytest.mark.parametrize("name", ITERATED)
def test_the_iteration_reaches_the_optimum(
    name: str, rank: int, dtype: torch.dtype, iterated: None
) -> None:
    w, exact = example(name, dtype)
    check(w, truncated_svd(w, rank), rank, exact=exact)


@pytest.mark.parametrize("count", usual([3, 40], {3}))
@pytest.mark.parametrize("where", ["right", "wrong", "one side"])
@pytest.mark.parametrize("name", ITERATED)
def test_the_start_of_the_iteration_does_not_matter(
    name: str, where: str, count: int, iterated: None
) -> None:
    """Also where the given directions have nothing of the triplets."""
    for dtype in (torch.float32, torch.float64):
        w, exact = example(name, dtype)
        u, vh = vectors(name, dtype)
        first = 0 if where == "right" else len(exact) - count
        near = Svd(u[:, first : first + count], torch.ones(count), vh[first : first + count])
        near = near._replace(vh=vh[:count]) if where == "one side" else near
        check(w, truncated_svd(w, 5, start=near), 5, exact=exact)


@pytest.mark.parametrize(
    "shape",
    [
        (1, 1),
        (1, 3),
        (3, 1),
        (2, 2),
        (1, 4096),
        (4096, 1),
        (5000, 64),
        (64, 5000),
        (40, 40),
        (257, 300),
    ],
)
@pytest.mark.parametrize("rank", [1, 3, 64, 1000])
def test_any_shape_and_rank(shape: tuple[int, int], rank: int) -> None:
    for dtype in (torch.float32, torch.float64):
        w = gaussian(*shape).to(dtype)
        check(w, truncated_svd(w, rank), min(rank, *shape), 1e-4)


@pytest.mark.parametrize("name", ITERATED)
def test_the_full_decomposition_agrees(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(truncated, "_krylov", lambda *_, **__: None)
    monkeypatch.setattr(truncated, "CHUNK", 20_000)
    for dtype in (torch.float32, torch.float64):
        w, exact = example(name, dtype)
        check(w, truncated_svd(w, 9), 9, exact=exact)


def test_flat_spectra_fall_back_when_the_iteration_is_too_slow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls, full = [], truncated._full
    monkeypatch.setattr(truncated, "_full", lambda *a: calls.append(1) or full(*a))
    for shape, rank in (((300, 300), 10), ((400, 900), 20), ((600, 600), 1)):
        w = gaussian(*shape).float()
        check(w, truncated_svd(w, rank), rank, 1e-4)
    assert calls


def test_a_finer_tolerance_is_kept() -> None:
    w = spectrum(300, 320, 10.0 ** -torch.linspace(0, 13, 300))
    actual = truncated_svd(w, 200, tolerance=1e-14)
    assert torch.allclose(actual.s, torch.linalg.svdvals(w)[:200], rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("scale", "dtype"),
    [(x, torch.float32) for x in (1e-30, 1e30)]
    + [(x, torch.float64) for x in (1e-200, 1e-30, 1e30, 1e200)],
)
@pytest.mark.parametrize("shape", [(30, 50), (300, 400)])
def test_scale_is_no_matter(shape: tuple[int, int], scale: float, dtype: torch.dtype) -> None:
    w = spectrum(*shape, 1 / counting(30))
    there, here = truncated_svd((w * scale).to(dtype), 4), truncated_svd(w.to(dtype), 4)
    assert torch.allclose(there.s.double() / scale, here.s.double(), rtol=1e-5)
    one, other = (
        actual.u * (actual.s.double() / unit) @ actual.vh.double()
        for actual, unit in ((there, scale), (here, 1.0))
    )
    assert torch.allclose(one, other, atol=1e-5)


def test_a_matrix_at_the_edge_of_its_dtype() -> None:
    for value in (3e38, 1e-40):
        actual = truncated_svd(torch.full((2, 3), value), 1)
        assert math.isclose(float(actual.s[0]), value * math.sqrt(6), rel_tol=1e-4) or (
            value > 1 and float(actual.s[0]) == math.inf
        )
        assert torch.allclose(actual.u.abs(), torch.tensor(0.5).sqrt())


@pytest.mark.parametrize("shape", [(30, 50), (600, 800)])
def test_strides_are_no_matter(shape: tuple[int, int]) -> None:
    w = spectrum(*shape, 1 / counting(30)).float()
    strided = torch.zeros(2 * shape[0], 3 * shape[1])
    strided[::2, ::3] = w
    turned = w.T.contiguous().T
    check(w, truncated_svd(strided[::2, ::3], 4), 4)
    check(w, truncated_svd(turned, 4), 4)
    check(w.T, truncated_svd(w.T, 4), 4)
    assert math.isclose(
        svd_for_energy(strided[::2, ::3], 0.5, 4)[1],
        float(w.double().square().sum()),
        rel_tol=1e-12,
    )


def test_the_input_is_left_alone_and_the_result_repeats() -> None:
    for w in (spectrum(300, 700, 1 / counting(300)).float(), gaussian(50, 20)):
        before, state = w.clone(), torch.get_rng_state()
        one = truncated_svd(w, 4)
        torch.randn(3)
        other = truncated_svd(w, 4)
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True)) and torch.equal(
            w, before
        )
        torch.set_rng_state(state)
        truncated_svd(w, 4)
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    w = torch.ones(4, 5)
    w[1, 2] = bad
    for decompose in (lambda: truncated_svd(w, 2), lambda: svd_for_energy(w, 0.5, 2)):
        with pytest.raises(ValueError, match="not finite"):
            decompose()


def test_invalid_matrices_and_ranks_are_refused() -> None:
    for w in (torch.ones(3), torch.ones(0, 3), torch.ones(2, 2, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match="matrix"):
            truncated_svd(w, 1)
    with pytest.raises(ValueError, match="rank"):
        truncated_svd(torch.ones(2, 2), 0)
    for energy, most in ((0.0, 1), (1.5, 1), (math.nan, 1), (0.5, 0)):
        with pytest.raises(ValueError, match="energy"):
            svd_for_energy(torch.ones(2, 2), energy, most)


# dtypes, and the highest ranks that are asked for
LIMITS = [(torch.float32, 10), (torch.float64, 1), (torch.float32, 1000)]


@pytest.mark.parametrize("energy", usual([0.1, 0.6, 0.97], {0.6}))
@pytest.mark.parametrize(
    "name", [name for name in ITERATED if name not in ("root", "zeros", "one element")]
)
@pytest.mark.parametrize("cost", [math.inf, None])
def test_the_smallest_rank_for_an_energy(
    name: str, energy: float, cost: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if cost:
        monkeypatch.setattr(truncated, "_full_cost", lambda *_: cost)
    for dtype, most in LIMITS:
        w, exact = example(name, dtype)
        squares = exact.square()
        k = int((squares.cumsum(0) < energy * squares.sum() * (1 - 1e-12)).sum()) + 1
        actual, total = svd_for_energy(w, energy, most)
        check(w, actual, min(k, most), exact=exact)
        assert math.isclose(total, float(w.double().square().sum()), rel_tol=1e-12)


@pytest.mark.parametrize("ratio", usual([1.6, 3.3, 20.5], {3.3}))
@pytest.mark.parametrize("name", ITERATED)
@pytest.mark.parametrize("cost", [math.inf, None])
def test_the_values_down_to_a_ratio(
    name: str, ratio: float, cost: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if cost:
        monkeypatch.setattr(truncated, "_full_cost", lambda *_: cost)
    for dtype, most in LIMITS:
        w, exact = example(name, dtype)
        k = max(1, int((exact * ratio >= exact[0]).sum())) if exact[0] > 0 else 1
        actual, total = svd_for_ratio(w, ratio, most)
        check(w, actual, min(k, most), exact=exact)
        assert math.isclose(total, float(w.double().square().sum()), rel_tol=1e-12)


@pytest.mark.parametrize("edge", [1.01, 1.04, 1.2])
def test_the_edge_of_the_noise_beyond_the_ratio_is_seen(
    edge: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The large values are found at once; that the first one behind them is below the limit must be
    known too."""
    monkeypatch.setattr(truncated, "_full_cost", lambda *_: math.inf)
    noise = torch.cat([torch.linspace(edge, 1, 12)[:-1], torch.linspace(0.98, 0.2, 480)])
    w = spectrum(500, 600, torch.cat([torch.tensor([20.0, 20.0, 20.0]), noise]))
    check(w, svd_for_ratio(w, 20.0001, 500)[0], 14)


def test_more_equal_values_than_fit_a_block_are_all_within_a_ratio(iterated: None) -> None:
    w = spectrum(400, 500, torch.cat([torch.full((50,), 2.0), 0.5 / counting(350)]))
    check(w, svd_for_ratio(w, 3.3, 400)[0], 50)


def test_a_ratio_that_most_values_are_within_is_soon_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes, ritz = [], truncated._ritz
    monkeypatch.setattr(
        truncated, "_ritz", lambda core, beyond: sizes.append(len(core)) or ritz(core, beyond)
    )
    w = gaussian(700, 800).float()
    actual, _ = svd_for_ratio(w, 20.0, 700)
    exact = torch.linalg.svdvals(w.double())
    check(w, actual, int((exact * 20 >= exact[0]).sum()))
    assert 0 < max(sizes) <= 260
    low = spectrum(600, 700, torch.cat([torch.ones(60), torch.full((540,), 1e-3)])).float()
    monkeypatch.setattr(truncated, "_full", lambda *_: pytest.fail("decomposed in full"))
    check(low, svd_for_ratio(low, 20.0, 600)[0], 60)


def test_ratios_beyond_float32_and_of_nothing() -> None:
    w = spectrum(300, 310, 10.0 ** -torch.linspace(0, 12, 300)).float()
    actual, _ = svd_for_ratio(w, 1e6, 300)
    assert abs(len(actual.s) - 150) <= 5
    assert len(svd_for_ratio(torch.zeros(30, 20), 5.0, 20)[0].s) == 1
    for ratio, most in ((0.5, 3), (math.nan, 3), (2.0, 0)):
        with pytest.raises(ValueError, match="ratio"):
            svd_for_ratio(torch.ones(2, 2), ratio, most)


def test_blocks_widen_until_equal_values_are_all_found(iterated: None) -> None:
    w = spectrum(600, 700, torch.cat([torch.ones(42), torch.exp(-counting(300) / 20) / 2]))
    check(w, svd_for_energy(w, 0.95, 600)[0], 43)  # 64 with only the 40 of the 42 that fit a block


def test_energy_of_tiny_null_and_full_matrices() -> None:
    for shape in ((1, 1), (1, 3), (3, 1), (300, 300)):
        actual, total = svd_for_energy(torch.zeros(shape), 0.9, 5)
        assert (len(actual.s), float(actual.s[0]), total) == (1, 0.0, 0.0)
    assert math.isclose(svd_for_energy(torch.full((3, 1), 1e30), 0.9, 5)[1], 3e60, rel_tol=1e-6)
    w = gaussian(300, 310).float()
    check(w, svd_for_energy(w, 1.0, 1000)[0], 300)
    check(w, svd_for_energy(w, 1.0, 7)[0], 7)
    w = spectrum(400, 450, counting(6))
    check(w, svd_for_energy(w, 1 - 1e-9, 1000)[0], 6)


@pytest.mark.parametrize("missing", [1e-5, 1e-8])
def test_energies_close_to_all(missing: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(truncated, "_full_cost", lambda *_: math.inf)
    w = spectrum(300, 400, torch.exp(-counting(60) / 4)).float()
    exact = torch.linalg.svdvals(w.double())
    k = int((exact.square().flip(0).cumsum(0).flip(0) > missing * exact.square().sum()).sum())
    check(w, svd_for_energy(w, 1 - missing, 300)[0], k, exact=exact)


def test_expansion_leaves_rounding_out() -> None:
    basis = torch.linalg.qr(gaussian(50, 50)).Q.float()
    panel = (gaussian(9, 3) @ gaussian(3, 50)).float()
    assert len(krylov.expand(basis, panel, 0.0).rows) == 0
    actual = krylov.expand(basis[:10], panel, 0.0)
    assert actual.rows.shape == (3, 50)
    assert torch.allclose(
        actual.inside @ basis[:10].double() + actual.beyond @ actual.rows.double(),
        panel.double(),
        atol=1e-5,
    )
    assert float((actual.rows @ basis[:10].T).abs().max()) < 1e-6


def test_equal_values_found_exactly_are_settled() -> None:
    ritz = truncated._Ritz(
        torch.ones(6, dtype=torch.float64),
        torch.eye(6, dtype=torch.float64),
        torch.zeros(6, dtype=torch.float64),
    )
    assert truncated._excess(ritz, 2, 0.0, 1e-6) <= 1
    assert (
        truncated._excess(
            ritz._replace(squares=torch.tensor([1.0, 1, 0, 0, 0, 0]).double()), 2, 1.0, 1e-6
        )
        <= 1
    )
    assert truncated._excess(ritz._replace(residuals=ritz.residuals + 1e-3), 2, 1.0, 1e-6) > 1


def test_values_good_to_s1_but_not_to_the_small_error_are_unsettled() -> None:
    squares = torch.tensor([1, 0.25, 1e-6, 0], dtype=torch.float64)
    ritz = truncated._Ritz(
        squares, torch.eye(4, dtype=torch.float64), torch.full((4,), 1e-9, dtype=torch.float64)
    )
    assert truncated._excess(ritz, 2, 1.0, 1e-6) > 1
    assert (
        truncated._excess(
            ritz._replace(squares=torch.tensor([1, 0.25, 1e-2, 0]).double()), 2, 1.0, 1e-6
        )
        <= 1
    )


def test_flat_spectra_are_soon_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, ritz = [], truncated._ritz
    monkeypatch.setattr(
        truncated, "_ritz", lambda core, beyond: sizes.append(len(core)) or ritz(core, beyond)
    )
    svd_for_energy(gaussian(700, 800).float(), 0.9, 600)
    assert 0 < max(sizes) <= 80
    truncated_svd(gaussian(1000, 1100).float(), 50)
    assert max(sizes) <= 350  # the budget alone would stop it at 522


def test_random_sizes_ranks_and_decays() -> None:
    pick = torch.Generator().manual_seed(3)
    draw = lambda low, high: int(torch.randint(low, high, (), generator=pick))
    for seed in range(60):
        n, m = draw(1, 420), draw(1, 420)
        q, rank, power = draw(1, min(n, m) + 1), draw(1, 40), draw(0, 5) / 2
        w = spectrum(n, m, counting(q) ** -power, seed).to(
            torch.float32 if seed % 3 else torch.float64
        )
        check(w, truncated_svd(w, rank), min(rank, n, m))

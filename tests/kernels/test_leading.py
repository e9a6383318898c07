"""Leading triplets of weights against LAPACK's in float64: values to the tolerance for every kind
of spectrum, on every path."""

import functools
import math

import pytest
import torch
from torch import Tensor

from adapterkit.kernels.lowrank import leading
from adapterkit.kernels.lowrank.leading import leading_triplets
from tests.kernels.test_truncated import ITERATED, check, counting, gaussian, spectrum
from tests.support.usual import usual

pytestmark = [pytest.mark.quick, pytest.mark.usefixtures("one_thread")]

SPECTRA = {
    **ITERATED,
    "flat": lambda: gaussian(500, 600),
    "flat, tall": lambda: gaussian(900, 400),
    "flat of a low rank": lambda: spectrum(400, 500, torch.linspace(2, 1, 100)),
    "flat beside outliers": lambda: (
        gaussian(400, 500) + spectrum(400, 500, torch.tensor([3e3, 1e3, 200.0]))
    ),
    "slow": lambda: spectrum(500, 600, counting(500) ** -0.2),
    "slow, to nothing": lambda: spectrum(500, 600, torch.linspace(1, 0, 500)),
}


@functools.cache
def example(name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The matrix and all of its singular values."""
    w = SPECTRA[name]().to(dtype)
    return w, torch.linalg.svdvals(w.double())


@pytest.fixture
def iterated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The iteration at any size and never another method; how often it took inexact products."""
    inexact, calls = leading._inexact, []
    monkeypatch.setattr(leading, "SMALL_SIDE", 0)
    monkeypatch.setattr(leading, "MAX_SHARE", 1.0)
    monkeypatch.setattr(leading, "truncated_svd", lambda *_: pytest.fail("another method"))
    monkeypatch.setattr(leading, "_inexact", lambda *a: calls.append(1) or inexact(*a))
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", usual([1, 8, 20], {8}))
@pytest.mark.parametrize("name", SPECTRA)
def test_values_are_within_the_tolerance(
    name: str, rank: int, dtype: torch.dtype, iterated: list[int]
) -> None:
    w, exact = example(name, dtype)
    actual = leading_triplets(w, rank)
    check(w, actual, rank, 1e-3, exact, values=1e-5)


def test_flat_spectra_take_inexact_products_and_decaying_ones_do_not(iterated: list[int]) -> None:
    leading_triplets(spectrum(500, 600, 1 / counting(500)).float(), 8)
    assert not iterated
    leading_triplets(gaussian(500, 600).float(), 8)
    assert iterated


def test_another_method_takes_over_if_the_iteration_does_not_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(leading, "SMALL_SIDE", 0)
    monkeypatch.setattr(leading, "MAX_SHARE", 0.25)
    w = gaussian(500, 600).float()
    check(w, leading_triplets(w, 8), 8, 1e-4)


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (3, 3), (5, 4096), (4096, 5)])
@pytest.mark.parametrize("rank", [1, 3, 64])
def test_any_shape_and_rank(shape: tuple[int, int], rank: int) -> None:
    w = gaussian(*shape).float()
    check(w, leading_triplets(w, rank), min(rank, *shape), 1e-4)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("kind", ["flat", "inverse"])
def test_scale_is_no_matter(scale: float, kind: str, iterated: list[int]) -> None:
    w = SPECTRA[kind]().float()
    there, here = leading_triplets(w * scale, 4), leading_triplets(w, 4)
    assert torch.allclose(there.s.double() / scale, here.s.double(), rtol=2e-5)


def test_the_result_repeats_and_the_input_is_left_alone(iterated: list[int]) -> None:
    for kind in ("flat", "flat, tall", "inverse"):
        w = SPECTRA[kind]().float()
        before, state = w.clone(), torch.get_rng_state()
        one, other = leading_triplets(w, 4), leading_triplets(w.T.contiguous().T, 4)
        assert torch.equal(w, before) and torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(a, b) for a, b in zip(one, leading_triplets(w, 4), strict=True))
        assert torch.allclose(one.s, other.s, rtol=1e-5)


def test_invalid_matrices_and_ranks_are_refused() -> None:
    for w in (torch.ones(3), torch.ones(0, 3), torch.ones(2, 2, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match="matrix"):
            leading_triplets(w, 1)
    with pytest.raises(ValueError, match="rank"):
        leading_triplets(torch.ones(2, 2), 0)
    with pytest.raises(ValueError, match="not finite"):
        leading_triplets(torch.full((400, 400), math.nan), 2)

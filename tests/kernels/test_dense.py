"""Decompositions of small, thin and awkward matrices on a GPU: on the host, or by Cholesky."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from adapterkit.core.registry import members
from adapterkit.kernels import dense
from adapterkit.kernels.lowrank import algebra, leading, subspace, truncated
from adapterkit.kernels.lowrank.algebra import Product
from tests.support import methods
from tests.support.card import DEVICE, Card, CardTensor, installed

pytestmark = [pytest.mark.quick, pytest.mark.usefixtures("one_thread")]
NAMES = ("eigh", "eigvalsh", "svd", "svdvals", "qr")
LARGE = dense.SMALL + 8


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def graded(power: int) -> Tensor:
    """Singular values down to that power of ten."""
    return draw(400, 20) * torch.logspace(0, power, 20, dtype=torch.float64) @ draw(20, 20)


@contextmanager
def card_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, tuple[int, ...]]]]:
    """What the card itself is asked to decompose."""
    calls: list[tuple[str, tuple[int, ...]]] = []

    def noted(name: str) -> Callable[..., Any]:
        own = getattr(torch.linalg, name)

        def call(x: Tensor, *arguments: Any, **options: Any) -> Any:
            if isinstance(x, CardTensor):
                calls.append((name, tuple(x.shape)))
            return own(x, *arguments, **options)

        return call

    with monkeypatch.context() as patch:
        for name in NAMES:
            patch.setattr(torch.linalg, name, noted(name))
        with installed(Card()), torch.inference_mode():
            yield calls


def results(name: str, x: Tensor) -> list[Tensor]:
    found = getattr(dense, name)(x)
    return [found] if isinstance(found, Tensor) else list(found)


@pytest.mark.parametrize("size", [3, LARGE])
@pytest.mark.parametrize("name", NAMES[:4])
def test_small_squares_and_zeros_are_decomposed_on_the_host(
    name: str, size: int, monkeypatch: pytest.MonkeyPatch
):
    x = draw(size, size)
    with card_calls(monkeypatch) as calls:
        for matrix in (x + x.T, 0 * x):
            there = results(name, matrix.to(DEVICE))
            assert all(part.is_cuda for part in there)
            for own, expected in zip(there, results(name, matrix), strict=True):
                assert torch.equal(own.cpu(), expected)
    assert calls == ([(name, (size, size))] if size == LARGE else [])


def test_matrices_that_fail_on_the_gpu_are_decomposed_on_the_host(monkeypatch: pytest.MonkeyPatch):
    x, own = draw(LARGE, LARGE), torch.linalg.eigh

    def fails(x: Tensor) -> Any:
        if isinstance(x, CardTensor):
            raise torch.linalg.LinAlgError("cusolver error: 7")
        return own(x)

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    with installed(Card()), torch.inference_mode():
        values, vectors = dense.eigh((x + x.T).to(DEVICE))
    assert torch.equal(values.cpu(), own(x + x.T)[0]) and vectors.is_cuda


THIN = {
    "well conditioned": draw(400, 20),
    "float32": draw(400, 20).float(),
    "ill conditioned": graded(-6),
    "singular": graded(-20),
    "of rank 3": draw(400, 3) @ draw(3, 20, seed=1),
    "zero": torch.zeros(400, 20, dtype=torch.float64),
    "one column": draw(400, 1),
    "empty": torch.zeros(400, 0),
}


@pytest.mark.parametrize("kind", THIN)
def test_thin_qr_on_a_gpu_is_orthonormal_and_exact(kind: str, monkeypatch: pytest.MonkeyPatch):
    x = THIN[kind]
    with card_calls(monkeypatch) as calls:
        q, r = (part.cpu() for part in dense.qr(x.to(DEVICE)))
    eps = torch.finfo(x.dtype).eps
    assert q.dtype == r.dtype == x.dtype and torch.equal(r, r.triu())
    assert torch.dist(q.T @ q, torch.eye(x.shape[1], dtype=x.dtype)) < 100 * eps
    assert torch.dist(q @ r, x) <= 100 * eps * x.norm()
    depends = kind in ("singular", "of rank 3", "zero", "empty")
    assert bool(calls) == depends


@pytest.mark.parametrize("shape", [(400, 20), (20, 400), (30, 40), (600, LARGE), (LARGE, 600)])
def test_svd_on_a_gpu_equals_the_cpu(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch):
    x = draw(*shape)
    with card_calls(monkeypatch) as calls:
        u, s, vh = (part.cpu() for part in dense.svd(x.to(DEVICE)))
    torch.testing.assert_close(s, torch.linalg.svdvals(x))
    torch.testing.assert_close((u * s) @ vh, x)
    assert calls == (
        [("svd", (LARGE, LARGE))]
        if min(shape) == LARGE and max(shape) > 2 * LARGE
        else [("svd", shape)]
        if min(shape) == LARGE
        else []
    )


WEIGHT = (draw(300, 500) @ torch.diag(torch.linspace(1, 0, 500).double() ** 4)).float()
FLAT = draw(600, 700).float()
PRODUCT = Product(draw(500, 12), draw(12, 400))
WORK: dict[str, Callable[[Callable[[Tensor], Tensor]], object]] = {
    "truncated": lambda to: truncated.truncated_svd(to(WEIGHT), 10),
    "energy": lambda to: truncated.svd_for_energy(to(WEIGHT), 0.9, 40),
    "ratio": lambda to: truncated.svd_for_ratio(to(WEIGHT), 4.0, 40),
    "leading": lambda to: leading.leading_triplets(to(FLAT), 8),
    "near optimal": lambda to: subspace.near_optimal_svd(to(FLAT), 8),
    "trailing": lambda to: truncated.trailing_svd(to(draw(300, 280)), 5),
    "principal": lambda to: truncated.principal_components(
        to(FLAT.T.double() @ FLAT.double() / 600), to(draw(700)), 8
    ),
    "product": lambda to: algebra.svd(Product(*map(to, PRODUCT))),
}


def is_small(name: str, shape: tuple[int, ...]) -> bool:
    """What the host, or Cholesky, is faster at."""
    return shape[0] >= 2 * shape[1] if name == "qr" else min(shape) <= dense.SMALL


@pytest.mark.parametrize("name", WORK)
def test_no_kernel_has_small_matrices_decomposed_on_the_gpu(
    name: str, monkeypatch: pytest.MonkeyPatch
):
    with card_calls(monkeypatch) as calls:
        WORK[name](lambda x: x.to(DEVICE))
    assert not [call for call in calls if is_small(*call)]


@pytest.mark.parametrize("name", [n for n in methods.METHODS if n not in methods.ON_ELEMENTS])
def test_no_method_has_squares_decomposed_on_the_gpu(name: str, monkeypatch: pytest.MonkeyPatch):
    products = [methods.product(60, 80, 4, seed) for seed in range(2)]
    with card_calls(monkeypatch) as calls:
        there = [Product(p.left.to(DEVICE), p.right.to(DEVICE)) for p in products]
        if name in ("regmean", "regspan"):
            seen = lambda which: methods.covariance_of(products[which].dense()).to(DEVICE)
            methods.record(name).combine_covariances(there, [0.5, 0.5], seen)
        else:
            methods.applied(methods.record(name), there, [0.5, 0.5])
    assert not [call for call in calls if call[0] != "qr"]  # each side once


@pytest.mark.parametrize("name", [n for n, one in members("inits").items() if one.needs])
def test_no_init_has_squares_decomposed_on_the_gpu(name: str, monkeypatch: pytest.MonkeyPatch):
    x, given = draw(80, 30).float(), {"variance": torch.tensor([36.0])}
    given |= {"covariance": x.T @ x / 80, "gradient": draw(20, 30).float()}
    given |= {"components": torch.eye(8, 30), "variances": torch.arange(8.0, 0, -1)}
    method = members("inits")[name]()
    with card_calls(monkeypatch) as calls:
        options = {kind: given[kind].to(DEVICE) for kind in method.needs if kind in given}
        if method.draws:
            options["generator"] = torch.Generator().manual_seed(1)
        method.factors(draw(20, 30).float().to(DEVICE), 4, 1.0, **options)
    assert not [call for call in calls if call[0] != "qr"]


def test_a_kernel_that_calls_the_gpu_for_a_small_square_is_seen(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dense, "SMALL", 0)
    with card_calls(monkeypatch) as calls:
        WORK["truncated"](lambda x: x.to(DEVICE))
    assert [call for call in calls if min(call[1]) <= 256]

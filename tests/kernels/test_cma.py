"""CMA-ES on functions whose minimum is known."""

import math

import pytest
import torch
from torch import Tensor

from adapterkit.kernels.cma import Cma

pytestmark = pytest.mark.quick


def sphere(x: Tensor) -> Tensor:
    return (x - 0.3).square().sum(-1)


def ellipsoid(x: Tensor) -> Tensor:
    """A condition of a million, turned."""
    n = x.shape[-1]
    turned = (x - 0.3) @ torch.linalg.qr(
        torch.ones(n, n).double() + torch.eye(n) * torch.arange(n)
    )[0]
    return (turned.square() * 10 ** (6 * torch.arange(n) / max(n - 1, 1))).sum(-1)


def rosenbrock(x: Tensor) -> Tensor:
    return (100 * (x[..., 1:] - x[..., :-1] ** 2) ** 2 + (1 - x[..., :-1]) ** 2).sum(-1)


def search(function, n: int, evaluations: int, **more) -> tuple[Tensor, float]:
    cma = Cma(torch.zeros(n), 0.5, **more)
    best = (math.inf, cma.mean)
    for _ in range(evaluations // cma.size):
        points = cma.ask()
        values = function(points)
        cma.tell(points, values)
        best = min(best, (float(values.min()), points[values.argmin()]), key=lambda one: one[0])
    return best[1], best[0]


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8])
def test_cma_finds_the_minimum_of_a_sphere(n: int):
    x, value = search(sphere, n, 200 * n)
    assert value < 1e-9 and torch.allclose(x, torch.full((n,), 0.3).double(), atol=1e-4)


@pytest.mark.parametrize("n", [2, 5])
def test_cma_finds_the_minimum_of_a_rotated_ellipsoid(n: int):
    assert search(ellipsoid, n, 800 * n)[1] < 1e-9


@pytest.mark.parametrize("seed", [0, 1])
def test_cma_finds_the_minimum_of_a_bent_valley(seed: int):
    x, value = search(rosenbrock, 5, 6000, seed=seed)
    assert value < 1e-9 and torch.allclose(x, torch.ones(5).double(), atol=1e-4)


def test_order_alone_counts():
    one = search(sphere, 3, 300)[0]
    assert torch.equal(search(lambda x: sphere(x).exp(), 3, 300)[0], one)


def test_a_minimum_outside_the_bounds_is_found_on_them():
    x, _ = search(lambda x: (x - 3).square().sum(-1), 3, 400, low=-1.0, high=2.0)
    assert torch.allclose(x, torch.full((3,), 2.0).double(), atol=1e-3)


def test_repeated_results_give_the_same_points():
    one, two = (Cma(torch.zeros(4), 0.3, seed=5) for _ in range(2))
    for _ in range(5):
        points = one.ask()
        assert torch.equal(points, two.ask()) and torch.equal(points, one.ask())
        one.tell(points, sphere(points))
        two.tell(points, sphere(points))
    assert not torch.equal(Cma(torch.zeros(4), 0.3, seed=6).ask(), Cma(torch.zeros(4), 0.3).ask())

"""Weights of singular triplets of a product, against a dense decomposition in float64."""

import pytest
import torch

from adapterkit.kernels.lowrank import directions
from adapterkit.kernels.lowrank.algebra import Product

pytestmark = pytest.mark.quick

SHAPES = [(7, 5, 3), (40, 30, 4), (5, 40, 1), (3, 9, 5), (9, 2, 4), (6, 6, 6)]


def random(n: int, m: int, rank: int) -> Product:
    generator = torch.Generator().manual_seed(n * m + rank)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    return Product(draw(n, rank), draw(rank, m))


@pytest.mark.parametrize(("n", "m", "rank"), SHAPES)
def test_as_a_dense_decomposition(n: int, m: int, rank: int):
    product = random(n, m, rank)
    count = directions.count((n, m), rank)
    weights = torch.linspace(-1, 2, count, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(product.dense(), full_matrices=False)
    assert int((s > 1e-12 * s[0]).sum()) == count
    expected = (u[:, :count] * (s[:count] * weights)) @ vh[:count]
    result = directions.weighted(product, weights.tolist())
    assert torch.allclose(result.dense(), expected, rtol=0, atol=1e-12 * float(s[0]))
    assert result.right is product.right
    left = directions.weighted_left(product.left.float(), product.right.float(), weights.tolist())
    assert left.dtype == torch.float32
    assert torch.allclose(left.double(), result.left, rtol=0, atol=1e-5)


def test_equal_weights_scale_whatever_the_rank():
    product = random(20, 10, 4)
    product.left[:, 3] = product.left[:, 2]  # rank 3
    for some in (product, Product(product.left * 0, product.right)):
        result = directions.weighted(some, [0.5] * 4)
        assert torch.allclose(result.dense(), 0.5 * some.dense(), atol=1e-12)

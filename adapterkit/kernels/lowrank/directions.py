"""Weights for the singular triplets (directions) of a delta."""

from collections.abc import Sequence

from torch import Tensor

from adapterkit.kernels.lowrank import algebra
from adapterkit.kernels.lowrank.algebra import Product


def count(shape: tuple[int, int], rank: int) -> int:
    """The number of triplets that `algebra.svd` gives for a product of that shape and rank."""
    return min(*shape, rank)


def weighted(product: Product, weights: Sequence[float]) -> Product:
    """Σₖ cₖ σₖ uₖ vₖᵀ = U diag(c) Uᵀ left @ right, the triplets of `algebra.svd`, σ falling.

    `right` does not change. With equal σ the directions are ambiguous, and c of σ = 0 has no
    effect."""
    u = algebra.svd(product).u
    c = u.new_tensor(weights)
    return Product(u @ (c[:, None] * (u.T @ product.left)), product.right)


def weighted_left(
    left: Tensor,  # (n, r)
    right: Tensor,  # (r, m)
    weights: Sequence[float],
) -> Tensor:  # (n, r)
    """The left factor of `weighted` in left's dtype, computed in float64."""
    return weighted(Product(left.double(), right.double()), weights).left.to(left.dtype)

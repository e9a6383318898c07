"""The linear combination of deltas whose outputs are nearest to each delta's on its own inputs: Σⱼ
cⱼ Δⱼ of least Σᵢ wᵢ E‖Σⱼ cⱼ Δⱼ xᵢ - Δᵢ xᵢ‖², from factors and Cᵢ = E[xᵢ xᵢᵀ], in float64."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from adapterkit.kernels.lowrank.algebra import Product, stack_products

ROUNDING = 1e-10  # smallest relative eigenvalue: below, deltas are the same
BLOCK = 1024  # rows of a covariance that are widened to float64 at a time


class Normal(NamedTuple):
    """The normal equations of one module, or their sum over several."""

    g: Tensor  # (k, k): Gⱼₗ = Σᵢ wᵢ tr(Δⱼ Cᵢ Δₗᵀ)
    h: Tensor  # (k,): hⱼ = Σᵢ wᵢ tr(Δⱼ Cᵢ Δᵢᵀ)
    energy: float  # Σᵢ wᵢ tr(Δᵢ Cᵢ Δᵢᵀ)

    def plus(self, other: "Normal") -> "Normal":
        return Normal(self.g + other.g, self.h + other.h, self.energy + other.energy)

    def error(self, c: Tensor) -> float:
        """The root of the minimized sum, relative to the outputs of the deltas; 0 for zeros."""
        left = self.energy - 2 * float(self.h @ c) + float(c @ self.g @ c)
        return (max(left, 0.0) / self.energy) ** 0.5 if self.energy > 0 else 0.0


def normal_equations(
    products: Sequence[Product | None],  # None: an adapter that lacks the module
    shares: Sequence[float],
    covariances: Callable[[int], Tensor],  # (in, in) of an adapter's inputs, read on demand
) -> Normal:
    """Normal equations from the factors: tr(Δⱼ C Δₗᵀ) = ⟨bⱼᵀ bₗ, aⱼ C aₗᵀ⟩; no delta is multiplied
    out, and no matrix of the inputs' width inverted."""
    own = [i for i, product in enumerate(products) if product is not None]
    both = stack_products([product for product in products if product is not None])
    gram = both.left.T @ both.left
    ranks = [0 if product is None else product.rank for product in products]
    owners = torch.eye(len(products)).repeat_interleave(torch.tensor(ranks), 0).to(gram)  # (R, k)
    g, h = torch.zeros(len(products), len(products)).double(), torch.zeros(len(products)).double()
    energy = 0.0
    for i in own:
        c = covariances(i).to(gram.device)
        seen = both.right.new_zeros(both.right.shape)
        for first in range(0, len(c), BLOCK):
            seen += both.right[:, first : first + BLOCK] @ c[first : first + BLOCK].double()
        traces = (owners.T @ (gram * (seen @ both.right.T)) @ owners).cpu()
        g += shares[i] * (traces + traces.T) / 2
        h += shares[i] * traces[:, i]
        energy += shares[i] * float(traces[i, i])
    return Normal(g, h, energy)


def solve(normal: Normal, ridge: float) -> Tensor:  # (k,)
    """The shortest c of (G + ridge · diag G) c = h, with each delta measured by its outputs: equal
    deltas get equal numbers, those without outputs 0."""
    size = normal.g.diagonal().clamp_min(0).sqrt()
    inverse = torch.where(size > 0, 1 / size, 0)
    unit = inverse[:, None] * normal.g * inverse
    unit.diagonal().add_(ridge)
    return inverse * (torch.linalg.pinv(unit, rtol=ROUNDING, hermitian=True) @ (inverse * normal.h))


def span_weights(
    modules: Iterable[tuple[str, Sequence[Product | None], Callable[[int], Tensor]]],
    shares: Sequence[float],
    ridge: float,
) -> dict[str, tuple[Tensor, float]]:
    """Return c (k,) of each group of modules, and the remaining error; `modules`: for each its
    group, its deltas and the covariances of each adapter's inputs."""
    sums: dict[str, Normal] = {}
    for group, products, covariances in modules:
        own = normal_equations(products, shares, covariances)
        sums[group] = sums[group].plus(own) if group in sums else own
    solved = {group: solve(normal, ridge) for group, normal in sums.items()}
    return {group: (c, sums[group].error(c)) for group, c in solved.items()}

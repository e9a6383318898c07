"""regmean: the delta whose outputs are closest to those of each adapter on that adapter's
inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from adapterkit.core.errors import Refused
from adapterkit.core.lazy import torch
from adapterkit.kernels.lowrank import weighted
from adapterkit.kernels.lowrank.algebra import Product, inner, stack_products
from adapterkit.verbs.combine.methods.common import check_count, check_share
from adapterkit.verbs.combine.methods.protocol import Covariances, Metrics, OnCovariances


@dataclass(frozen=True)
class RegMean(OnCovariances):
    """Δ' = (Σᵢ wᵢ Δᵢ C̃ᵢ) (Σᵢ wᵢ C̃ᵢ)⁻¹, C̃ᵢ = Cᵢ with elements off the diagonal times alpha: the
    least Σᵢ wᵢ E‖(Δ' - Δᵢ) xᵢ‖², Cᵢ = E[xᵢ xᵢᵀ]. Rank Σ rᵢ.

    From the factors: b = [b₁ b₂ ...], a = [w₁ a₁ C̃₁; w₂ a₂ C̃₂; ...] (Σᵢ wᵢ C̃ᵢ)⁻¹. Equal
    covariances give `mean`. d times the mean of all diagonals is added to each C̃ᵢ, d as in
    `kernels/lowrank/weighted.py`: if the inputs do not vary, the result is the weighted mean. The
    refit minimizes the error in the norm of Σᵢ wᵢ C̃ᵢ, so that it has the least sum of its rank.
    The paper has no weights, sums instead of means, and whole weights instead of deltas, which is
    equivalent on one base."""

    alpha: float = 0.9
    name = "regmean"
    source = "arXiv:2212.09849"
    acts_on = "covariances"

    def __post_init__(self):
        check_share("alpha", self.alpha)

    def check_weights(self, weights: Sequence[float]) -> None:
        if min(weights) < 0 or sum(weights) == 0:
            raise Refused(
                f"weights {', '.join(f'{weight:g}' for weight in weights)}",
                expected="none below 0, and a sum to divide by",
                where="weights",
                hint="use --method linear",
                code="AK107",
            )

    def combine_covariances(
        self, products: Sequence[Product], weights: Sequence[float], covariances: Covariances
    ) -> tuple[Product, torch.Tensor, Metrics]:
        check_count(weights, len(products))
        self.check_weights(weights)
        width = products[0].right.shape[1]
        total = products[0].right.new_zeros(width, width)  # Σ wᵢ C̃ᵢ
        rights = []  # wᵢ aᵢ C̃ᵢ
        for i, (product, weight) in enumerate(zip(products, weights, strict=True)):
            c = covariances(i).to(total)
            diagonal = c.diagonal().clone()
            c.mul_(self.alpha).diagonal().copy_(diagonal)
            rights.append(weight * product.right @ c)
            total.add_(c, alpha=weight)
        root, damping = weighted.cholesky(total)
        mean = float(total.diagonal().mean())
        ridge = damping * mean / sum(weights)
        parts = [
            Product(product.left, right + weight * ridge * product.right)
            for product, weight, right in zip(products, weights, rights, strict=True)
        ]
        both = stack_products(parts)  # Σ wᵢ Δᵢ C̃ᵢ
        solved = Product(both.left, torch.cholesky_solve(both.right.T, root).T / mean)
        energy = sum(inner(one, part) for one, part in zip(products, parts, strict=True))
        left_over = max(1 - inner(solved, both) / energy, 0.0) if energy > 0 else 0.0
        return solved, root.float(), {"damping": damping, "distance": left_over**0.5}

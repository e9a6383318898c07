"""svc: the sum, where several deltas push one direction weakened to the size that each gives it."""

from collections.abc import Sequence
from dataclasses import dataclass

from adapterkit.core.lazy import torch
from adapterkit.kernels.lowrank.algebra import Product
from adapterkit.verbs.combine.methods.common import check_share, svd_of_sum
from adapterkit.verbs.combine.methods.protocol import Metrics, OnFactors, Seeds

TINY = 1e-20  # of the singular value's square: a delta without a part in the direction


@dataclass(frozen=True)
class Svc(OnFactors):
    """Δ' = U diag(γ S) Vᵀ, U S Vᵀ the singular value decomposition of Σᵢ wᵢ Δᵢ,
    γᵣ = k / Σᵢ max(alpha, sᵢᵣ), sᵢᵣ = ⟨uᵣᵀ Σⱼ wⱼΔⱼ, uᵣᵀ wᵢΔᵢ⟩ / ‖uᵣᵀ wᵢΔᵢ‖², k deltas.

    sᵢᵣ is by how much the sum is larger than delta i in the direction uᵣ of the outputs, along what
    it does there: above 1 the others push it too. alpha is 1/k by default, as in the paper's
    experiments: a direction that one delta alone has grows by up to k²/(2k-1); at 1 none grows. A
    delta without a part in a direction has sᵢᵣ = 0. The paper has no weights: here they belong to
    the deltas. Equal deltas of equal weights give one of them.
    """

    alpha: float | None = None
    name = "svc"
    tier = "experimental"
    source = "arXiv:2602.05536 (SVC)"
    acts_on = "factors"

    def __post_init__(self):
        if self.alpha is not None:
            check_share("alpha", self.alpha, above_zero=True)

    def combine_factors(
        self, products: Sequence[Product], weights: Sequence[float], seeds: Seeds
    ) -> tuple[Product, Metrics]:
        u, s, vh = svd_of_sum(products, weights)
        total, count = torch.zeros_like(s), len(products)
        least = 1 / count if self.alpha is None else self.alpha
        for product, weight in zip(products, weights, strict=True):
            left = weight * (u.T @ product.left)  # uᵣᵀ wᵢ Δᵢ = left @ right
            along = s * torch.sum(left * (vh @ product.right.T), 1)
            squares = torch.sum(left * (left @ (product.right @ product.right.T)), 1)
            scale = torch.where(squares > TINY * s.square(), along / squares, 0.0)
            total += scale.clamp_min(least)
        factor = count / total
        return Product(u * (factor * s), vh), {"calibration": float(factor[0])}

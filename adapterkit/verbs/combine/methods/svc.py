"""svc: the sum, in which directions that several deltas share are scaled down to count once."""

from collections.abc import Sequence
from dataclasses import dataclass

from adapterkit.core.lazy import torch
from adapterkit.kernels.lowrank.algebra import Product
from adapterkit.verbs.combine.methods.common import check_share, svd_of_sum
from adapterkit.verbs.combine.methods.protocol import Metrics, OnFactors, Seeds

TINY = 1e-20  # of the singular value's square: below it, the delta has no share in the direction


@dataclass(frozen=True)
class Svc(OnFactors):
    """Δ' = U diag(γ S) Vᵀ, U S Vᵀ the singular value decomposition of Σᵢ wᵢ Δᵢ, γᵣ = k / Σᵢ
    max(alpha, sᵢᵣ), sᵢᵣ = ⟨uᵣᵀ Σⱼ wⱼΔⱼ, uᵣᵀ wᵢΔᵢ⟩ / ‖uᵣᵀ wᵢΔᵢ‖², k deltas.

    sᵢᵣ is the ratio of the sum to delta i in the output direction uᵣ, along the delta's own row
    there; above 1 the other deltas push it too. alpha is 1/k by default, as in the paper's
    experiments: a direction of one delta alone grows by up to k²/(2k-1); at alpha 1 none grows. A
    delta without this direction has sᵢᵣ = 0. The paper has no weights; here they multiply the
    deltas. Equal deltas of equal weights give one of them."""

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

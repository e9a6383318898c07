"""iso_cts: the strongest directions of the sum and more directions of each delta, all with the same
strength."""

from collections.abc import Sequence
from dataclasses import dataclass

from adapterkit.core.lazy import torch
from adapterkit.kernels.lowrank.algebra import Product, svd
from adapterkit.verbs.combine.methods.common import (
    check_share,
    nearest_orthogonal,
    sizes,
    svd_of_sum,
    without_noise,
)
from adapterkit.verbs.combine.methods.protocol import Metrics, OnFactors, Seeds


@dataclass(frozen=True)
class IsoCts(OnFactors):
    """Δ' = s̄ Û V̂ᵀ, Û and V̂ the orthogonal matrices nearest to [U₁ U₂ ... U] and [V₁ V₂ ... V],
    U S Vᵀ the c strongest triplets of Σᵢ wᵢ Δᵢ, Uᵢ Sᵢ Vᵢᵀ the d strongest of (1 - U Uᵀ) wᵢ Δᵢ,
    s̄ the mean of all these singular values.

    c + k d = R, k deltas, d = round((R - int(common R)) / k), R the rank of the sum, as in iso_c;
    the paper's R is min(out, in). Triplets with a singular value of 0 are arbitrary and skipped.
    The weights belong to the deltas; the paper has none.
    """

    common: float = 0.8
    name = "iso_cts"
    source = "arXiv:2502.04959 (Iso-CTS)"
    acts_on = "factors"

    def __post_init__(self):
        check_share("common", self.common)

    def combine_factors(
        self, products: Sequence[Product], weights: Sequence[float], seeds: Seeds
    ) -> tuple[Product, Metrics]:
        whole, count = svd_of_sum(products, weights), len(products)
        rank = len(whole.s) if float(whole.s[0]) else 0
        each = min(round((rank - int(self.common * rank)) / count), rank // count)
        shared = whole.top(rank - count * each if rank else 1)
        parts = [shared]
        for product, weight, size in zip(products, weights, sizes(products, weights), strict=True):
            own = product.left - shared.u @ (shared.u.T @ product.left)
            rest = svd(Product(weight * own, product.right))
            parts.append(without_noise(rest, size).top(each))
        u = nearest_orthogonal(torch.cat([part.u for part in parts], 1))
        vh = nearest_orthogonal(torch.cat([part.vh for part in parts], 0).T).T
        mean = torch.cat([part.s for part in parts]).mean()
        return Product(u * mean, vh), {"strength": float(mean)}

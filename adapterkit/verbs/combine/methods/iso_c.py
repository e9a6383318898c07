"""iso_c: the directions of the sum, all with the same strength."""

from collections.abc import Sequence
from dataclasses import dataclass

from adapterkit.kernels.lowrank.algebra import Product
from adapterkit.verbs.combine.methods.common import svd_of_sum
from adapterkit.verbs.combine.methods.protocol import Metrics, OnFactors, Seeds


@dataclass(frozen=True)
class IsoC(OnFactors):
    """Δ' = s̄ U Vᵀ, U S Vᵀ the singular value decomposition of Σᵢ wᵢ Δᵢ, s̄ the mean of S.

    It has R values, the rank of the sum (singular values above 1e-12 of the deltas' norms), at most
    Σ rᵢ. The paper has min(out, in) values, of full matrices. A sum of lower rank has arbitrary
    directions beyond R, so these are skipped, also in the mean."""

    name = "iso_c"
    source = "arXiv:2502.04959 (Iso-C)"
    acts_on = "factors"

    def combine_factors(
        self, products: Sequence[Product], weights: Sequence[float], seeds: Seeds
    ) -> tuple[Product, Metrics]:
        u, s, vh = svd_of_sum(products, weights)
        mean = s.mean()
        return Product(u * mean, vh), {"strength": float(mean)}

"""iso_c: the directions of the sum, all at the same strength."""

from collections.abc import Sequence
from dataclasses import dataclass

from adapterkit.combinations.common import check_count, significant
from adapterkit.combinations.protocol import Facts
from adapterkit.kernels.lowrank import Product, norm, stacked, svd


@dataclass(frozen=True)
class IsoC:
    """Δ' = s̄ U Vᵀ, U S Vᵀ the singular value decomposition of Σᵢ wᵢ Δᵢ, s̄ the mean of its R singular values.

    R is the rank of the sum (singular values above 1e-12 of the deltas' size), at most Σ rᵢ. The paper has min(out, in) values, of
    full matrices: of a sum of lower rank the further directions would be arbitrary, so they are left out, of the mean too.
    """

    name = "iso_c"
    source = "arXiv:2502.04959 (Iso-C)"

    def products(
        self, products: Sequence[Product], weights: Sequence[float]
    ) -> tuple[Product, Facts]:
        check_count(weights, len(products))
        found = svd(stacked(products, weights))
        kept = significant(
            found, sum(abs(w) * norm(p) for p, w in zip(products, weights, strict=True))
        )
        if not len(kept.s):
            kept = found.top(1)
            return Product(kept.u * 0, kept.vh), {"strength": 0.0}
        mean = kept.s.mean()
        return Product(kept.u * mean, kept.vh), {"strength": float(mean)}

"""subspace_boost: the sum, in which weak directions are raised to the strength of a stronger
one."""

from collections.abc import Sequence
from dataclasses import dataclass

from adapterkit.kernels.lowrank.algebra import Product
from adapterkit.verbs.combine.methods.common import check_share, svd_of_sum
from adapterkit.verbs.combine.methods.protocol import Metrics, OnFactors, Seeds


@dataclass(frozen=True)
class SubspaceBoost(OnFactors):
    """Δ' = U diag(max(S, Sₖ)) Vᵀ, U S Vᵀ the singular value decomposition of Σᵢ wᵢ Δᵢ, k the first
    with S₁ + ... + Sₖ ≥ beta (S₁ + S₂ + ...).

    beta 1 gives the sum; near 0 all directions are as strong as the first. The R singular values of
    the sum count, as in iso_c. The paper has beta 0 to 0.02, of full matrices. For a sum of LoRAs
    that always selects the first value, so there is no default."""

    beta: float
    name = "subspace_boost"
    tier = "experimental"
    source = "arXiv:2506.16506 (Subspace Boosting)"
    acts_on = "factors"

    def __post_init__(self):
        check_share("beta", self.beta)

    def combine_factors(
        self, products: Sequence[Product], weights: Sequence[float], seeds: Seeds
    ) -> tuple[Product, Metrics]:
        u, s, vh = svd_of_sum(products, weights)
        sums = s.cumsum(0)
        first = int((sums < self.beta * sums[-1]).sum())
        boosted = s.clamp_min(float(s[min(first, len(s) - 1)]))
        return Product(u * boosted, vh), {"boosted": 1 - (first + 1) / len(s)}

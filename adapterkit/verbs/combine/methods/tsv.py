"""tsv: the strongest singular vectors of each delta, made orthogonal to those of the others."""

from collections.abc import Sequence
from dataclasses import dataclass

from adapterkit.core.lazy import torch
from adapterkit.kernels.lowrank.algebra import Product, Svd
from adapterkit.verbs.combine.methods.common import (
    check_count,
    check_share,
    nearest_orthogonal,
    svd_of_sum,
)
from adapterkit.verbs.combine.methods.protocol import Metrics, OnFactors, Seeds


@dataclass(frozen=True)
class Tsv(OnFactors):
    """Δ' = Û diag(w₁S₁, w₂S₂, ...) V̂ᵀ, Û and V̂ the orthogonal matrices nearest to [U₁ U₂ ...] and
    [V₁ V₂ ...], Δᵢ ≈ Uᵢ Sᵢ Vᵢᵀ.

    Each delta keeps int(share · min(out, in)) of its triplets (at least one), share 1/k by default,
    as in the paper: all triplets of an adapter whose rank is no higher. Triplets with a singular
    value of 0 are arbitrary and skipped. Procrustes: X = P Σ Qᵀ becomes P Qᵀ over the Σ above 1e-8
    (of unit vectors), so that equal deltas with weights 1 give that delta."""

    share: float | None = None
    name = "tsv"
    source = "arXiv:2412.00081 (TSV-Merge)"
    acts_on = "factors"

    def __post_init__(self):
        if self.share is not None:
            check_share("share", self.share, above_zero=True)

    def combine_factors(
        self, products: Sequence[Product], weights: Sequence[float], seeds: Seeds
    ) -> tuple[Product, Metrics]:
        check_count(weights, len(products))
        smaller = min(products[0].left.shape[0], products[0].right.shape[1])
        keep = smaller // len(products) if self.share is None else int(self.share * smaller)
        whole = [svd_of_sum([p], [1.0]) for p in products]
        top = [svd.top(max(keep, 1)) for svd in whole]
        u = nearest_orthogonal(torch.cat([t.u for t in top], 1))
        vh = nearest_orthogonal(torch.cat([t.vh for t in top], 0).T).T
        s = torch.cat([t.s * weight for t, weight in zip(top, weights, strict=True)])
        return Product(u * s, vh), {"kept_energy": _energy(top) / (_energy(whole) or 1.0)}


def _energy(svds: Sequence[Svd]) -> float:
    return sum(float(svd.s.square().sum()) for svd in svds)

"""tsv: the strongest singular triplets of each delta, made orthogonal to the others' before they are added."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adapterkit.combinations.common import check_count, check_share, significant
from adapterkit.combinations.protocol import Facts
from adapterkit.kernels.lowrank import Product, Svd, norm, svd


@dataclass(frozen=True)
class Tsv:
    """Δ' = Û diag(w₁S₁, w₂S₂, ...) V̂ᵀ, Û and V̂ the orthogonal matrices nearest to [U₁ U₂ ...] and [V₁ V₂ ...], Δᵢ ≈ Uᵢ Sᵢ Vᵢᵀ.

    Each delta keeps int(share · min(out, in)) of its triplets (at least one), share 1/k by default, as in the paper: all those of
    an adapter whose rank is no higher than that. Triplets with a singular value of 0 are arbitrary and left out. Procrustes:
    X = P Σ Qᵀ becomes P Qᵀ over the Σ above 1e-8 (of unit vectors), so that equal deltas with weights 1 give that delta.
    """

    share: float | None = None
    name = "tsv"
    source = "arXiv:2412.00081 (TSV-Merge)"

    def __post_init__(self):
        if self.share is not None:
            check_share("share", self.share, above_zero=True)

    def products(
        self, products: Sequence[Product], weights: Sequence[float]
    ) -> tuple[Product, Facts]:
        check_count(weights, len(products))
        smaller = min(products[0].left.shape[0], products[0].right.shape[1])
        keep = smaller // len(products) if self.share is None else int(self.share * smaller)
        whole = [_svd(p) for p in products]
        kept = [found.top(max(keep, 1)) for found in whole]
        u, vh = (
            _nearest(torch.cat([t.u for t in kept], 1)),
            _nearest(torch.cat([t.vh for t in kept], 0).T).T,
        )
        s = torch.cat([t.s * weight for t, weight in zip(kept, weights, strict=True)])
        return Product(u * s, vh), {"kept_energy": _energy(kept) / (_energy(whole) or 1.0)}


def _svd(product: Product) -> Svd:
    """The triplets that are not noise; of a delta of 0, one that is 0 throughout."""
    found = svd(product)
    kept = significant(found, norm(product))
    return kept if len(kept.s) else Svd(*(0 * part for part in found.top(1)))


def _nearest(
    x: Tensor,  # (n, K)
) -> Tensor:  # (n, K)
    """The orthogonal matrix (orthonormal columns, or rows if K > n) nearest to x, on the span of x."""
    q, core = torch.linalg.qr(x)
    p, s, qh = torch.linalg.svd(core, full_matrices=False)
    p, qh = p[:, s > 1e-8], qh[s > 1e-8]
    return q @ p @ qh


def _energy(found: Sequence[Svd]) -> float:
    return sum(float(t.s.square().sum()) for t in found)

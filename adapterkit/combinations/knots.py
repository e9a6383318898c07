"""knots: ties in the coordinates that the left singular vectors of all deltas together give."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adapterkit.combinations.common import (
    check_count,
    check_majority,
    check_share,
    conflict_metric,
    without_noise,
)
from adapterkit.combinations.protocol import Metrics, OnFactors
from adapterkit.kernels.elementwise import Majority, Trim, elect, top_k_threshold
from adapterkit.kernels.lowrank.algebra import Product, norm, svd


@dataclass(frozen=True)
class Knots(OnFactors):
    """Δ' = U · ties(S V₁, S V₂, ...; w), U S [V₁ V₂ ...] the singular value decomposition of
    [Δ₁ Δ₂ ...]: rank at most Σ rᵢ.

    As in the authors' code ties gets the singular values (S Vᵢ = Uᵀ Δᵢ); in the paper's text it
    gets Vᵢ. Signs are elected and entries counted as in ties here, by module (the authors: over the
    whole model). Singular values below 1e-12 of all deltas' norms are noise and skipped (theirs:
    below 1e-5, whatever the norm). Each column of U has its largest element positive, as the choice
    matters where a sum is 0.
    """

    density: float
    majority: Majority = "total"
    name = "knots"
    source = "arXiv:2410.19735"
    acts_on = "factors"

    def __post_init__(self):
        check_share("density", self.density)
        check_majority(self.majority)

    def combine_factors(
        self, products: Sequence[Product], weights: Sequence[float]
    ) -> tuple[Product, Metrics]:
        check_count(weights, len(products))
        u = _basis(products)
        parts = [(u.T @ p.left) @ p.right for p in products]  # S Vᵢ, (R, in)
        for part in parts:
            keep = int(self.density * part.numel())
            read = lambda part=part: [part.clone()]
            Trim(top_k_threshold(read, part.numel(), keep, device=part.device))(part)
        elected = torch.empty_like(parts[0])
        metrics = conflict_metric(*elect(parts, weights, self.majority, elected))
        return Product(u, elected), metrics


def _basis(products: Sequence[Product]) -> Tensor:  # (out, R)
    """U, from the factors: rightᵢᵀ = Pᵢ Tᵢ, so [Δ₁ Δ₂ ...] has the left singular vectors of
    [left₁ T₁ᵀ, left₂ T₂ᵀ, ...]."""
    beside = torch.cat([p.left @ torch.linalg.qr(p.right.T, mode="r").R.T for p in products], 1)
    identity = torch.eye(beside.shape[1], dtype=beside.dtype, device=beside.device)
    whole = svd(Product(beside, identity))
    u = without_noise(whole, sum(norm(p) for p in products)).u
    if not u.shape[1]:  # all deltas are 0
        u = torch.zeros_like(whole.u[:, :1])
    largest = u.gather(0, u.abs().argmax(0, keepdim=True))
    return u * torch.where(largest < 0, -1.0, 1.0)

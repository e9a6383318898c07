"""knots: apply ties to the deltas in the basis of their joint left singular vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from adapterkit.core.lazy import Tensor, torch
from adapterkit.kernels.lowrank.algebra import Product
from adapterkit.verbs.combine.methods.common import InCores, Majority, basis


@dataclass(frozen=True)
class Knots(InCores):
    """Δ' = U · ties(S V₁, S V₂, ...; w), U S [V₁ V₂ ...] the singular value decomposition of [Δ₁ Δ₂
    ...]: rank at most Σ rᵢ. `inner`: another method on elements than ties.

    As in the authors' code, ties gets the singular values (S Vᵢ = Uᵀ Δᵢ); in the paper's text it
    gets Vᵢ. Signs are elected and entries counted as in ties here, by module (the authors: over the
    whole model). Singular values below 1e-12 of all deltas' norms are noise and skipped (theirs:
    below 1e-5, whatever the norm). Each column of U has its largest element positive, because the
    choice matters where a sum is 0."""

    density: float
    majority: Majority = "total"
    inner: str = "ties"
    name = "knots"
    source = "arXiv:2410.19735"
    acts_on = "factors"

    def bases(self, products: Sequence[Product]) -> tuple[Tensor, None]:
        """rightᵢᵀ = Pᵢ Tᵢ, so [Δ₁ Δ₂ ...] has the left singular vectors of
        [left₁ T₁ᵀ, left₂ T₂ᵀ, ...]."""
        adjacent = [p.left @ torch.linalg.qr(p.right.T, mode="r").R.T for p in products]
        return basis(torch.cat(adjacent, 1)), None

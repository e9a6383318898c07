"""knots: ties in the coordinates that the left singular vectors of all deltas together give."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adapterkit.combinations.common import (
    check_count,
    check_majority,
    check_share,
    conflict,
    significant,
)
from adapterkit.combinations.protocol import Facts
from adapterkit.kernels.elementwise import Majority, Trim, elect, largest
from adapterkit.kernels.lowrank import Product, norm, signed, svd


@dataclass(frozen=True)
class Knots:
    """Δ' = U · ties(S V₁, S V₂, ...; w), U S [V₁ V₂ ...] the singular value decomposition of [Δ₁ Δ₂ ...]: rank at most Σ rᵢ.

    As the authors' code, the singular values are in what ties sees (S Vᵢ = Uᵀ Δᵢ); the paper's text has Vᵢ. Its signs are elected
    and its entries counted as in ties here, by module (the authors: over the whole model). Singular values below 1e-12 of all
    deltas' size are noise and left out (theirs: below 1e-5, whatever the size). Each column of U has its largest element positive,
    as the choice matters where a sum is 0.
    """

    density: float
    majority: Majority = "total"
    name = "knots"
    source = "arXiv:2410.19735"

    def __post_init__(self):
        check_share("density", self.density)
        check_majority(self.majority)

    def products(
        self, products: Sequence[Product], weights: Sequence[float]
    ) -> tuple[Product, Facts]:
        check_count(weights, len(products))
        u = _basis(products)
        parts = [(u.T @ p.left) @ p.right for p in products]  # S Vᵢ, (R, in)
        for part in parts:
            Trim(
                largest(
                    lambda part=part: [part.clone()], part.numel(), int(self.density * part.numel())
                )
            )(part)
        merged = torch.empty_like(parts[0])
        metrics = conflict(*elect(parts, weights, self.majority, merged))
        return Product(u, merged), metrics


def _basis(products: Sequence[Product]) -> Tensor:  # (out, R)
    """U, from the factors: rightᵢᵀ = Pᵢ Tᵢ, so [Δ₁ Δ₂ ...] has the left singular vectors of [left₁ T₁ᵀ, left₂ T₂ᵀ, ...]."""
    beside = torch.cat([p.left @ torch.linalg.qr(p.right.T, mode="r").R.T for p in products], 1)
    found = svd(
        Product(beside, torch.eye(beside.shape[1], dtype=beside.dtype, device=beside.device))
    )
    kept = significant(found, sum(norm(p) for p in products))
    u = kept.u if len(kept.s) else torch.zeros_like(found.u[:, :1])  # all deltas are 0
    return torch.stack([signed(column) for column in u.T], 1)

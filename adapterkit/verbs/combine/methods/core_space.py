"""core_space: ties, or another method on elements, in the core of bases that the factors share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from adapterkit.core.lazy import Tensor, torch
from adapterkit.kernels.lowrank.algebra import Product
from adapterkit.verbs.combine.methods.common import InCores, Majority, basis


@dataclass(frozen=True)
class CoreSpace(InCores):
    """Δ' = U · inner(Uᵀ Δ₁ Vᵀ, Uᵀ Δ₂ Vᵀ, ...; w) · V, U the left singular vectors of
    [s₁b₁ s₂b₂ ...], V the right ones of [a₁; a₂; ...]: rank at most Σ rᵢ.

    No delta loses anything in its core (Σ rᵢ)². The bases, and so the signs that are elected,
    depend on the factors, not on the deltas alone, as in the paper, whose b has no scale: the same
    where all scales are equal. `inner`: any method on elements that has a density; its other
    options have their defaults. Each vector has its largest element positive. The authors' ties
    gives a sum of 0 the sign of the majority of all elements, here it is +.
    """

    density: float
    majority: Majority = "total"
    inner: str = "ties"
    name = "core_space"
    tier = "experimental"
    source = "arXiv:2509.17786 (Core Space)"
    acts_on = "factors"
    by_factors = True

    def bases(self, products: Sequence[Product]) -> tuple[Tensor, Tensor]:
        left = torch.cat([p.left for p in products], 1)
        right = torch.cat([p.right for p in products], 0)
        return basis(left), basis(right.T).T

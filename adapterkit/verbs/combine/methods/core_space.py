"""core_space: apply ties, or another method on elements, to small matrices in a basis that all
factors share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from adapterkit.core.lazy import Tensor, torch
from adapterkit.kernels.lowrank.algebra import Product
from adapterkit.verbs.combine.methods.common import InCores, Majority, basis


@dataclass(frozen=True)
class CoreSpace(InCores):
    """Δ' = U · inner(Uᵀ Δ₁ Vᵀ, Uᵀ Δ₂ Vᵀ, ...; w) · V, U the left singular vectors of [s₁b₁ s₂b₂
    ...], V the right ones of [a₁; a₂; ...]: rank at most Σ rᵢ.

    The core (Σ rᵢ)² represents every delta exactly. The bases, and therefore the elected signs,
    depend on the factors and not only on the deltas, as in the paper. Its b has no scale, so the
    results agree if all scales are equal. `inner`: any method on elements that has a density; its
    other options keep their defaults. Each vector has its largest element positive. For a sum of 0,
    the authors' ties takes the sign of the majority of all elements; here it is +."""

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

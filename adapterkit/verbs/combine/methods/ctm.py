"""ctm: project the deltas onto directions that they share, then apply ties or another method on
elements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from adapterkit.core.errors import Refused
from adapterkit.core.lazy import Tensor, torch
from adapterkit.kernels.lowrank.algebra import Product, norm
from adapterkit.verbs.combine.methods.common import (
    InCores,
    Majority,
    basis,
    check_share,
    cores_of,
    with_signs,
)

ROUNDS = 1000
RISE = 1e-7  # of the energy, by a round, below which the bases are taken for converged


@dataclass(frozen=True)
class Ctm(InCores):
    """Δ' = U · inner(Uᵀ Δ₁ Vᵀ, Uᵀ Δ₂ Vᵀ, ...; w) · V, U (out, r) and Vᵀ (in, r) orthonormal with
    the largest Σᵢ ‖Uᵀ Tᵢ Vᵀ‖², Tᵢ = Δᵢ (beta + (1 - beta) n̄ / ‖Δᵢ‖), n̄ the mean of the ‖Δᵢ‖: rank
    r, whatever the method inside does.

    `dimensions`: r, by default the largest rank of the deltas. beta 1: large deltas dominate the
    bases; 0: all count equally (the authors' command for image models has 0.25). The bases are
    Tucker's of the stacked Tᵢ, found by alternating from each side's own singular vectors (HOOI
    from HOSVD) inside the core of the factors. It stops when a round adds less than 1e-7 of the
    energy (the authors: when the relative error falls by less than 1e-6), or after 1000 rounds. The
    weights count in the method inside, not in the bases. `inner`: as in core_space."""

    density: float
    majority: Majority = "total"
    inner: str = "ties"
    beta: float = 0.25
    dimensions: int | None = None
    name = "ctm"
    tier = "experimental"
    source = "arXiv:2606.03723 (Compress then Merge)"
    acts_on = "factors"

    def __post_init__(self):
        super().__post_init__()
        check_share("beta", self.beta)
        if self.dimensions is not None and self.dimensions < 1:
            raise Refused(
                f"dimensions {self.dimensions}",
                expected="1 or more",
                where="--set dimensions",
                hint="give the rank of the result",
                code="AK101",
            )

    def bases(self, products: Sequence[Product]) -> tuple[Tensor, Tensor]:
        rank = self.dimensions or max(p.rank for p in products)
        u = basis(torch.cat([p.left for p in products], 1))
        v = basis(torch.cat([p.right for p in products], 0).T).T
        norms = [norm(p) for p in products]
        mean = sum(norms) / len(norms)
        targets = torch.stack(
            [
                core * (self.beta + (1 - self.beta) * mean / size if size else 0.0)
                for core, size in zip(cores_of(products, u, v), norms, strict=True)
            ]
        )
        left, right = _tucker(targets, rank)
        return with_signs(u @ left), with_signs(v.T @ right).T


def _tucker(
    x: Tensor,  # (k, n, m)
    rank: int,
) -> tuple[Tensor, Tensor]:  # (n, r), (m, r), orthonormal columns
    """The bases of both sides with the largest Σᵢ ‖Uᵀ Xᵢ V‖²; fewer columns if there are fewer
    directions."""
    left, right = _leading(x, rank), _leading(x.mT, rank)
    energy = 0.0
    for _ in range(ROUNDS):
        left = _leading(x @ right, rank)
        right = _leading(x.mT @ left, rank)
        before, energy = energy, float((left.T @ x @ right).square().sum())
        if energy - before <= RISE * energy:
            break
    return left, right


def _leading(x: Tensor, rank: int) -> Tensor:
    """The leading left singular vectors of [X₁ X₂ ...]."""
    return basis(x.movedim(0, 1).flatten(1))[:, :rank]

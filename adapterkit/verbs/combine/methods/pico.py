"""pico: the sum, in which the output directions that the deltas share are damped."""

from collections.abc import Sequence
from dataclasses import dataclass

from adapterkit.core.lazy import torch
from adapterkit.kernels import dense
from adapterkit.kernels.lowrank.algebra import Product, norm, stack_products
from adapterkit.verbs.combine.methods.common import NOISE, check_count, sizes
from adapterkit.verbs.combine.methods.protocol import Metrics, OnFactors, Seeds


@dataclass(frozen=True)
class Pico(OnFactors):
    """Δ' = n̄ Σ̃ / ‖Σ̃‖, Σ̃ = U diag(α) Uᵀ Σᵢ wᵢ Δᵢ, αⱼ = 1 / (1 + (k - 1) σⱼ² / Σₗ σₗ²), U and σ
    the left singular vectors and the singular values of [s₁b₁ s₂b₂ ...], n̄ the mean of the ‖wᵢ
    Δᵢ‖, k deltas. Rank Σ rᵢ.

    The damping depends on the factors and not only on the deltas, as in the paper, whose b has no
    scale. The paper has no weights; here they multiply the deltas, and not b. There, damping
    precedes any method; here, the sum."""

    name = "pico"
    tier = "experimental"
    source = "arXiv:2604.16826 (Pico)"
    acts_on = "factors"
    by_factors = True
    stacks = True

    def combine_factors(
        self, products: Sequence[Product], weights: Sequence[float], seeds: Seeds
    ) -> tuple[Product, Metrics]:
        check_count(weights, len(products))
        u, s, _ = dense.svd(torch.cat([p.left for p in products], 1))
        shares = s.square() / s.square().sum().clamp_min(1e-300)
        damping = 1 / (1 + (len(products) - 1) * shares)
        both = stack_products(products, weights)
        damped = Product(u @ (damping[:, None] * (u.T @ both.left)), both.right)
        mean, size = float(sizes(products, weights).mean()), norm(damped)
        ratio = mean / size if size > NOISE * mean else 0.0
        return Product(ratio * damped.left, damped.right), {"damping": float(damping.min())}

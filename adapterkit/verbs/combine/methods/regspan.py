"""regspan: the linear combination of the deltas whose outputs are closest to those of each adapter
on its inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from adapterkit.core.errors import Refused
from adapterkit.core.lazy import torch
from adapterkit.kernels.lowrank import span
from adapterkit.kernels.lowrank.algebra import Product, stack_products, svd
from adapterkit.verbs.combine.methods.common import check_count
from adapterkit.verbs.combine.methods.protocol import Covariances, Metrics, OnCovariances, Over
from adapterkit.verbs.combine.methods.regmean import RegMean


@dataclass(frozen=True)
class RegSpan(OnCovariances):
    """Δ' = Σⱼ cⱼ Δⱼ of least Σᵢ wᵢ E‖(Δ' - Δᵢ) xᵢ‖²: (G + ridge · diag G) c = h, Gⱼₗ = Σᵢ wᵢ tr(Δⱼ
    Cᵢ Δₗᵀ), hⱼ = Σᵢ wᵢ tr(Δⱼ Cᵢ Δᵢᵀ). Rank Σ rᵢ.

    `regmean` without new directions: one number for each adapter, by module, or summed over the
    modules of a layer or of the adapter (`per`). A delta that has no effect on these inputs gets 0,
    equal ones share; `ridge` makes weights smaller if deltas resemble each other. The refit is in
    the norm of Σᵢ wᵢ Cᵢ."""

    per: Over = "module"
    ridge: float = 0.0
    name = "regspan"
    source = "arXiv:2212.09849 (RegMean), restricted to the span of the deltas"
    acts_on = "covariances"

    def __post_init__(self):
        if not 0 <= self.ridge < float("inf"):
            expected = "a finite number of at least 0"
            raise Refused(
                f"ridge {self.ridge!r}", expected=expected, where="--set ridge", code="AK101"
            )

    @property
    def over(self) -> Over:
        return self.per

    def check_weights(self, weights: Sequence[float]) -> None:
        RegMean().check_weights(weights)

    def combine_covariances(
        self, products: Sequence[Product], weights: Sequence[float], covariances: Covariances
    ) -> tuple[Product, torch.Tensor, Metrics]:
        check_count(weights, len(products))
        self.check_weights(weights)
        normal = span.normal_equations(products, weights, covariances)
        c = span.solve(normal, self.ridge)
        result = stack_products(products, c.tolist())
        nearest, root, facts = RegMean(alpha=1.0).combine_covariances(
            products, weights, covariances
        )
        outputs = lambda one: float(svd(Product(one.left, one.right @ root.double())).s.norm())
        size, apart = outputs(nearest), outputs(stack_products([result, nearest], [1.0, -1.0]))
        facts |= {
            "distance": normal.error(c),
            "from_regmean": apart / size if size > 0 else 0.0,
            "least_weight": float(c.min()),
            "largest_weight": float(c.max()),
        }
        return result, root, facts

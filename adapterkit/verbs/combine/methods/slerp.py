"""slerp: interpolate between two deltas along the arc between them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from adapterkit.core.errors import Refused
from adapterkit.kernels.lowrank.algebra import Product, gram, stack_products
from adapterkit.verbs.combine.methods.common import check_count, check_share
from adapterkit.verbs.combine.methods.protocol import Metrics, OnFactors, Seeds


@dataclass(frozen=True)
class Slerp(OnFactors):
    """Δ' = (|w₁|+|w₂|) · (sin((1-t)θ)/sin θ · Δ₁ + sin(tθ)/sin θ · Δ₂), t = |w₂| / (|w₁|+|w₂|).

    Its rank is r₁ + r₂. The weights' ratio sets the position on the arc, their sum the length; a
    negative weight negates its delta. The option t equals weights (1-t, t), and replaces weights. θ
    is the angle between the deltas as vectors; they are not normalized, as in mergekit.

    For parallel deltas, and for a delta of 0, which has no direction (a module that only one
    adapter has), the result is the straight line w₁Δ₁ + w₂Δ₂ (mergekit: also where |cos θ| >
    0.9995, and θ = 90° for a delta of 0). Raises `Refused` for opposite ones (1 + cos θ < 1e-12),
    which have no arc between them, and for more than two deltas."""

    t: float | None = None
    name = "slerp"
    tier = "core"
    source = "Shoemake 1985, doi:10.1145/325334.325242"
    acts_on = "factors"
    stacks = True

    def __post_init__(self):
        if self.t is not None:
            check_share("t", self.t)

    def check_weights(self, weights: Sequence[float]) -> None:
        if len(weights) > 2:
            raise Refused(
                f"{len(weights)} adapters",
                expected="two",
                where="--method slerp",
                hint="use --method karcher for more than two",
                code="AK107",
            )

    def resolve_weights(self, weights: Sequence[float]) -> list[float]:
        """(1-t, t) if t is set, else the adapters' weights."""
        if self.t is None or len(weights) < 2:
            return list(weights)
        self.check_weights(weights)
        if any(weight != 1 for weight in weights):
            raise Refused(
                f"t {self.t:g} and weights {', '.join(f'{w:g}' for w in weights)}",
                expected="one of them: both are the position on the arc",
                where="--set t",
                hint=f"give only t: t {self.t:g} is weights {1 - self.t:g} and {self.t:g}",
                code="AK107",
            )
        return [1 - self.t, self.t]

    def combine_factors(
        self, products: Sequence[Product], weights: Sequence[float], seeds: Seeds
    ) -> tuple[Product, Metrics]:
        check_count(weights, len(products))
        self.check_weights(weights)
        if len(products) == 1 or 0 in weights:
            return stack_products(products, weights), {"angle": 0.0}
        angle, length = _angle(products, weights), sum(map(abs, weights))
        parts = [abs(weight) / length for weight in weights]
        if math.sin(angle) > 0:
            parts = [math.sin(part * angle) / math.sin(angle) for part in parts]
        shares = [math.copysign(length * p, w) for p, w in zip(parts, weights, strict=True)]
        return stack_products(products, shares), {"angle": angle}


def _angle(products: Sequence[Product], weights: Sequence[float]) -> float:
    """θ in radians; 0 if a delta is 0."""
    table = gram(products)
    norms = [math.sqrt(max(float(table[i, i]), 0)) * weights[i] for i in range(2)]
    if not norms[0] or not norms[1]:
        return 0.0
    cosine = float(table[0, 1]) * weights[0] * weights[1] / abs(norms[0] * norms[1])
    if 1 + cosine < 1e-12:
        raise Refused(
            "two deltas in opposite directions",
            expected="an arc between them",
            where="--method slerp",
            hint="use linear",
            code="AK107",
        )
    return math.acos(min(cosine, 1.0))

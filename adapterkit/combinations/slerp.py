"""slerp: from one delta to another along the arc between them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from adapterkit.combinations.common import check_count, check_share
from adapterkit.combinations.protocol import Facts
from adapterkit.errors import Refused
from adapterkit.kernels.lowrank import Product, gram, stacked


@dataclass(frozen=True)
class Slerp:
    """Δ' = (|w₁|+|w₂|) · (sin((1-t)θ)/sin θ · Δ₁ + sin(tθ)/sin θ · Δ₂), t = |w₂| / (|w₁|+|w₂|): rank r₁ + r₂.

    The weights say where on the arc, and by their sum how long; a negative one turns its delta round. The option t says the same as
    weights (1-t, t), and stands without weights. θ is the angle between the deltas as vectors; they are not normalised, as in
    mergekit. Parallel ones, and a delta of 0, which has no direction (what only one of the adapters has), give the straight line
    w₁Δ₁ + w₂Δ₂ (mergekit: also where |cos θ| > 0.9995, and θ = 90° for a delta of 0). Opposite ones (1 + cos θ < 1e-12) have no arc
    between them and are refused.
    """

    t: float | None = None
    name = "slerp"
    source = "Shoemake 1985, doi:10.1145/325334.325242"

    def __post_init__(self):
        if self.t is not None:
            check_share("t", self.t)

    def check(self, weights: Sequence[float]) -> None:
        if len(weights) > 2:
            found, hint = f"{len(weights)} adapters", "use --method karcher for more than two"
            raise Refused(found, expected="two", where="--method slerp", hint=hint)

    def weighted(self, weights: Sequence[float]) -> list[float]:
        """The adapters' weights, as t says them if it is given."""
        if self.t is None or len(weights) < 2:
            return list(weights)
        self.check(weights)
        if any(weight != 1 for weight in weights):
            found = f"t {self.t:g} and weights {', '.join(f'{w:g}' for w in weights)}"
            hint = f"leave t out, or the weights: t {self.t:g} is weights {1 - self.t:g} and {self.t:g}"
            raise Refused(
                found, expected="one of them: both say where on the arc", where="--set t", hint=hint
            )
        return [1 - self.t, self.t]

    def products(
        self, products: Sequence[Product], weights: Sequence[float]
    ) -> tuple[Product, Facts]:
        check_count(weights, len(products))
        self.check(weights)
        if len(products) == 1 or 0 in weights:
            return stacked(products, weights), {"angle": 0.0}
        angle, length = _angle(products, weights), sum(map(abs, weights))
        parts = [abs(weight) / length for weight in weights]
        if math.sin(angle) > 0:
            parts = [math.sin(part * angle) / math.sin(angle) for part in parts]
        return stacked(
            products, [math.copysign(length * p, w) for p, w in zip(parts, weights, strict=True)]
        ), {"angle": angle}


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
        )
    return math.acos(min(cosine, 1.0))

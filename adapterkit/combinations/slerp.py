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
    """Δ' = sin((1-t)θ)/sin θ · w₁Δ₁ + sin(tθ)/sin θ · w₂Δ₂, θ the angle between w₁Δ₁ and w₂Δ₂ as vectors: rank r₁ + r₂.

    Deltas are not normalised, as in mergekit. Parallel ones, and a delta of 0, which has no direction, give the straight line
    (1-t)·w₁Δ₁ + t·w₂Δ₂ (mergekit: also where |cos θ| > 0.9995, and θ = 90° for a delta of 0). Opposite ones (1 + cos θ < 1e-12)
    have no arc between them and are refused. What only one of the adapters has stays as it is, w₁Δ₁.
    """

    t: float = 0.5
    name = "slerp"
    source = "Shoemake 1985, doi:10.1145/325334.325242"

    def __post_init__(self):
        check_share("t", self.t)

    def check(self, weights: Sequence[float]) -> None:
        if len(weights) > 2:
            found, do = f"{len(weights)} adapters", "use --method karcher for more than two"
            raise Refused(found, expected="two", where="--method slerp", do=do)

    def products(self, products: Sequence[Product], weights: Sequence[float]) -> tuple[Product, Facts]:
        check_count(weights, len(products))
        self.check(weights)
        if len(products) == 1:
            return stacked(products, weights), {"angle": 0.0}
        angle = _angle(products, weights)
        first, second = 1 - self.t, self.t
        if math.sin(angle) > 0:
            first, second = (math.sin(part * angle) / math.sin(angle) for part in (first, second))
        return stacked(products, [first * weights[0], second * weights[1]]), {"angle": angle}


def _angle(products: Sequence[Product], weights: Sequence[float]) -> float:
    """θ in radians; 0 if a delta is 0."""
    table = gram(products)
    norms = [math.sqrt(max(float(table[i, i]), 0)) * weights[i] for i in range(2)]
    if not norms[0] or not norms[1]:
        return 0.0
    cosine = float(table[0, 1]) * weights[0] * weights[1] / abs(norms[0] * norms[1])
    if 1 + cosine < 1e-12:
        raise Refused("two deltas in opposite directions", expected="an arc between them", where="--method slerp", do="use linear")
    return math.acos(min(cosine, 1.0))

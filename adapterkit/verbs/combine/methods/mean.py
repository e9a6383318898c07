"""mean: the weighted mean, exact."""

from collections.abc import Sequence
from dataclasses import dataclass

from adapterkit.core.errors import Refused
from adapterkit.verbs.combine.methods.common import WeightedSum


@dataclass(frozen=True)
class Mean(WeightedSum):
    """Δ' = Σᵢ wᵢ Δᵢ / Σᵢ wᵢ: stacked factors, rank Σ rᵢ."""

    name = "mean"
    tier = "core"
    source = "arXiv:2203.05482 (model soups)"
    acts_on = "factors"

    def check_weights(self, weights: Sequence[float]) -> None:
        if sum(weights) == 0:
            raise Refused(
                "weights that add up to 0",
                expected="a sum to divide by",
                where="weights",
                hint="use --method linear",
                code="AK107",
            )

    def shares(self, weights: Sequence[float]) -> list[float]:
        self.check_weights(weights)
        return [weight / sum(weights) for weight in weights]

"""ema: an exponential moving average of the adapters in the given order, exact."""

from collections.abc import Sequence
from dataclasses import dataclass

from adapterkit.verbs.combine.methods.common import WeightedSum, check_share


@dataclass(frozen=True)
class Ema(WeightedSum):
    """Δ' = eₖ, e₁ = w₁ Δ₁, eᵢ = decay · eᵢ₋₁ + (1 - decay) · wᵢ Δᵢ.

    The last adapters count most; the smaller decay, the more so.
    """

    decay: float
    name = "ema"
    source = "arXiv:1306.2759 (exponential moving averages)"
    acts_on = "factors"

    def __post_init__(self):
        check_share("decay", self.decay)

    def shares(self, weights: Sequence[float]) -> list[float]:
        decayed = [
            self.decay ** (len(weights) - 1 - i) * (1 - self.decay if i else 1)
            for i in range(len(weights))
        ]
        return [share * weight for share, weight in zip(decayed, weights, strict=True)]

"""linear: the weighted sum, exact."""

from collections.abc import Sequence
from dataclasses import dataclass

from adapterkit.combinations.common import WeightedSum


@dataclass(frozen=True)
class Linear(WeightedSum):
    """Δ' = Σᵢ wᵢ Δᵢ: the factors side by side, rank Σ rᵢ.

    PEFT's `cat`; its `linear` has cross terms: that is --space factors.
    """

    name = "linear"
    source = "arXiv:2212.04089 (task arithmetic)"
    acts_on = "factors"

    def shares(self, weights: Sequence[float]) -> list[float]:
        return list(weights)

"""ties: keep the largest elements of each delta, elect a sign for each element, and average the
values with that sign."""

from __future__ import annotations

from dataclasses import dataclass

from adapterkit.verbs.combine.methods.common import (
    Majority,
    Prune,
    PrunedElection,
    check_share,
    trim,
)
from adapterkit.verbs.combine.methods.protocol import Deltas, Seeds


@dataclass(frozen=True)
class Ties(PrunedElection):
    """Δ' = Σᵢ kᵢ wᵢ τᵢ / max(Σᵢ kᵢ, 1), τᵢ the int(density·n) largest magnitudes of Δᵢ, kᵢ =
    [sign(τᵢ) = sign of Σⱼ τⱼ].

    PEFT's rule: signs are elected without the weights (frequency: by Σⱼ sign(τⱼ)), 0 counts as +,
    and the divisor is a number, not a sum of weights. (mergekit's divisor is, and weights count in
    its election: the two agree if all weights are 1.) Among equal magnitudes at the threshold, the
    first in row-major order are kept; both leave that open."""

    density: float
    majority: Majority = "total"
    name = "ties"
    tier = "core"
    source = "arXiv:2306.01708"
    acts_on = "elements"

    def __post_init__(self):
        check_share("density", self.density)

    def pruning(self, deltas: Deltas, which: int, seeds: Seeds) -> Prune:
        return trim(deltas, which, self.density)

"""linear: the weighted sum, exact."""

from collections.abc import Sequence
from dataclasses import dataclass

from adapterkit.core.errors import Refused
from adapterkit.core.lazy import Tensor
from adapterkit.verbs.combine.methods.common import WeightedSum


@dataclass(frozen=True)
class Linear(WeightedSum):
    """Δ' = Σᵢ wᵢ Δᵢ: stacked factors, rank Σ rᵢ.

    PEFT's `cat`. PEFT's `linear` has cross terms: use --space factors for it.
    `strength="strongest"`: Δ' = min(1, maxᵢ ‖wᵢ Δᵢ‖ / ‖Σⱼ wⱼ Δⱼ‖) Σᵢ wᵢ Δᵢ, norms over all modules,
    so that the sum is no larger than its largest term; deltas that cancel each other are not made
    larger."""

    strength: str | None = None
    name = "linear"
    tier = "core"
    source = "arXiv:2212.04089 (task arithmetic)"
    acts_on = "factors"

    def __post_init__(self):
        if self.strength not in (None, "strongest"):
            raise Refused(
                f"strength {self.strength!r}",
                expected="strongest",
                where="--set strength",
                hint="without it the weights are the adapters' own",
                code="AK101",
            )

    @property
    def scales(self) -> bool:
        return self.strength is not None

    def scale(self, gram: Tensor) -> float:
        largest, whole = float(gram.diagonal().max()), float(gram.sum())
        return min(1.0, (largest / whole) ** 0.5) if whole > 0 else 1.0

    def shares(self, weights: Sequence[float]) -> list[float]:
        return list(weights)

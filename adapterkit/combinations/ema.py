"""ema: an exponential moving average over the adapters in the order given, exact."""

from collections.abc import Sequence
from dataclasses import dataclass

from adapterkit.combinations.common import check_share
from adapterkit.combinations.protocol import Facts
from adapterkit.kernels.lowrank import Product, stacked


@dataclass(frozen=True)
class Ema:
    """Δ' = eₖ, e₁ = w₁ Δ₁, eᵢ = decay · eᵢ₋₁ + (1 - decay) · wᵢ Δᵢ: the last adapters count most, the smaller decay the more so."""

    decay: float
    name = "ema"
    source = "arXiv:1306.2759 (exponential moving averages)"

    def __post_init__(self):
        check_share("decay", self.decay)

    def products(self, products: Sequence[Product], weights: Sequence[float]) -> tuple[Product, Facts]:
        shares = [self.decay ** (len(weights) - 1 - i) * (1 - self.decay if i else 1) for i in range(len(weights))]
        return stacked(products, [share * weight for share, weight in zip(shares, weights, strict=True)]), {}

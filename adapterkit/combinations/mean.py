"""mean: the weighted mean, exact."""

from collections.abc import Sequence
from dataclasses import dataclass

from adapterkit.combinations.protocol import Facts
from adapterkit.errors import Refused
from adapterkit.kernels.lowrank import Product, stacked


@dataclass(frozen=True)
class Mean:
    """Δ' = Σᵢ wᵢ Δᵢ / Σᵢ wᵢ: the factors side by side, rank Σ rᵢ."""

    name = "mean"
    source = "arXiv:2203.05482 (model soups)"

    def products(self, products: Sequence[Product], weights: Sequence[float]) -> tuple[Product, Facts]:
        whole = sum(weights)
        if whole == 0:
            raise Refused("weights that add up to 0", expected="a sum to divide by", where="weights", do="use --method linear")
        return stacked(products, [weight / whole for weight in weights]), {}

"""linear: Δ' = Σ weight · Δ, exact."""

from collections.abc import Sequence
from dataclasses import dataclass

from adapterkit.combinations.protocol import Facts
from adapterkit.kernels.lowrank import Product, stacked


@dataclass(frozen=True)
class Linear:
    """Δ' = Σᵢ wᵢ Δᵢ: the factors side by side, rank Σ rᵢ. (PEFT's `cat`; its `linear` has cross terms, see --space factors.)"""

    name = "linear"
    source = "arXiv:2212.04089 (task arithmetic)"

    def products(self, products: Sequence[Product], weights: Sequence[float]) -> tuple[Product, Facts]:
        return stacked(products, weights), {}

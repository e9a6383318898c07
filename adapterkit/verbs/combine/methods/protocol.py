"""Protocols of the combination methods. A method is a frozen record that acts on factors (without a
dense delta), on factors and the covariances of the layers' inputs, or on elements by blocks of
rows.

Deltas are scale · b @ a, the scale included; the user's weights are separate. The planner skips
deltas of weight 0."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, Literal, NamedTuple, Protocol

from adapterkit.core.lazy import Tensor, torch
from adapterkit.core.registry import STABLE, Tier
from adapterkit.kernels.block_sizes import piece
from adapterkit.kernels.lowrank.algebra import Product
from adapterkit.kernels.quant.stochastic import Draws
from adapterkit.kernels.rows import row_ranges

BLOCK = 1 << 19  # elements of a dense delta that are multiplied out at a time on a CPU
Over = Literal["module", "layer", "adapter"]
Metrics = dict[str, float]  # for the receipt
# E[x xᵀ] (in, in) float32 of the inputs that adapter `which` saw, read on each call; the
# caller may change it
Covariances = Callable[[int], Tensor]


Seeds = Callable[[int], Draws]  # of delta `which` of a module, whatever else is drawn


class Deltas:
    """Deltas of one module, or their cores. Rows of a product are multiplied out in float32 on each
    access, which is cheaper than keeping them. `wide`: in float64, then rounded, so that
    comparisons of values have the same outcome on every kind of device."""

    def __init__(self, deltas: Sequence[Product | Tensor], *, wide: bool = False):
        dtype = torch.float64 if wide else torch.float32
        self.deltas = [
            Product(d.left.to(dtype), d.right.to(dtype)) if isinstance(d, Product) else d
            for d in deltas
        ]
        first, self.count = self.deltas[0], len(deltas)
        sides = (first.left, first.right) if isinstance(first, Product) else (first, first)
        self.shape, self.device = (sides[0].shape[0], sides[1].shape[1]), sides[0].device
        self.dtype = torch.float32 if isinstance(first, Product) else first.dtype

    def blocks(self) -> list[tuple[int, int]]:
        """Rows [first, last) of each block: a function of the shape and the device alone."""
        return row_ranges(*self.shape, piece(self.device, BLOCK))

    def rows(self, which: int, first: int, last: int) -> Tensor:
        """Rows [first, last) of delta `which`, (last - first, in); the caller may change them."""
        delta = self.deltas[which]
        if isinstance(delta, Product):
            return (delta.left[first:last] @ delta.right).to(self.dtype)
        return delta[first:last].clone()


class DenseDelta(NamedTuple):
    delta: Tensor  # (out, in), of the deltas' dtype
    metrics: Metrics


class _Weighted(Protocol):
    name: ClassVar[str]
    source: ClassVar[str]  # the paper
    tier: ClassVar[Tier] = STABLE
    draws: ClassVar[bool] = False  # a random number for each element
    ridge: float = 0.0  # of weights that are found by outputs
    by_factors: ClassVar[bool] = False  # the result depends on the factors, not only on the deltas

    def check_weights(self, weights: Sequence[float]) -> None:
        """Raise `Refused` for weights for which the method is not defined."""
        return

    def resolve_weights(self, weights: Sequence[float]) -> list[float]:
        """The weights, or those that an option of the method sets instead."""
        return list(weights)

    @property
    def over(self) -> Over:
        """The scope of one set of weights that is found by outputs; for a layer or an adapter it is
        found with `ridge` before anything is combined."""
        return "module"

    @property
    def scales(self) -> bool:
        """True if the method needs `scale`, which is called before anything is combined."""
        return False

    def scale(self, gram: Tensor) -> float:
        """The common factor of all weights, from the inner products ⟨wᵢ Δᵢ, wⱼ Δⱼ⟩ (k, k) over all
        modules."""
        return 1.0


class OnFactors(_Weighted, Protocol):
    """A method on factors, float64, exact up to rounding."""

    acts_on: ClassVar[Literal["factors"]]
    # the factors are stacked: the rank is the sum, for any values
    stacks: ClassVar[bool] = False

    @abstractmethod
    def combine_factors(
        self, products: Sequence[Product], weights: Sequence[float], seeds: Seeds
    ) -> tuple[Product, Metrics]:
        """The product that combines all, and metrics."""


class OnCovariances(_Weighted, Protocol):
    """A method on factors and on the covariances of the layer's inputs with each adapter,
    float64."""

    acts_on: ClassVar[Literal["covariances"]]

    @abstractmethod
    def combine_covariances(
        self, products: Sequence[Product], weights: Sequence[float], covariances: Covariances
    ) -> tuple[Product, Tensor, Metrics]:
        """The product that combines all, and the root (in, in) float32 of the norm in which its
        refit is the best; see `kernels/lowrank/weighted.py`. Raises ValueError for matrices that
        are no covariances."""


class OnElements(_Weighted, Protocol):
    """A method on the elements of dense deltas in float32, or of cores in float64."""

    acts_on: ClassVar[Literal["elements"]]

    @abstractmethod
    def combine_elements(
        self, deltas: Deltas, weights: Sequence[float], seeds: Seeds
    ) -> DenseDelta:
        """The dense delta that combines all, and metrics."""


Method = OnFactors | OnCovariances | OnElements

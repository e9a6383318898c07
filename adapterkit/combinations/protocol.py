"""What a method of combining is: either it acts on factors, and never sees a dense delta, or on elements, by blocks of rows.

Deltas are scale * b @ a, the scale folded in; weights are the user's, apart. A record has `name`, `source` (paper) and one of

    products(products, weights) -> Product          on factors, float64, exact but for rounding
    merged(deltas, weights, seeds) -> Merged        on elements, float32

Both return also metrics for the receipt, floats by name. A method that is a weighted sum has `shares(weights)` too,
what each delta is multiplied by: it can be carried out on values that are no factors. One that cannot do with all
weights has `check(weights)`, which raises `Refused`; one with an option that says the weights in another way has
`weighted(weights)`, which gives them. A delta of weight 0 takes no part: the planner leaves it out.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

from torch import Generator, Tensor

from adapterkit.kernels.lowrank import Product

Facts = dict[str, float]


class Deltas(Protocol):
    """The dense deltas of one module, made anew from their factors whenever a block of them is read: that is cheaper than keeping
    them."""

    shape: tuple[int, int]  # (out, in) of each
    count: int

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Rows [first, last) of each block: a function of the shape alone."""
        ...

    def rows(self, which: int, first: int, last: int) -> Tensor:
        """Rows [first, last) of delta `which`, (last - first, in) float32; the caller may change them."""
        ...


class Merged(NamedTuple):
    delta: Tensor  # (out, in) float32
    metrics: Facts


class OnFactors(Protocol):
    name: str
    source: str

    def products(
        self, products: Sequence[Product], weights: Sequence[float]
    ) -> tuple[Product, Facts]: ...


class OnElements(Protocol):
    name: str
    source: str

    def merged(self, deltas: Deltas, weights: Sequence[float], seeds: "Seeds") -> Merged: ...


class Seeds(Protocol):
    def __call__(self, which: int) -> Generator:
        """The random numbers of delta `which` of this module: the same whatever else is drawn, in whatever order."""
        ...

"""Combination methods on small dense deltas: what calls them, and deltas that are awkward."""

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from adapterkit.core import registry
from adapterkit.kernels.lowrank.algebra import Product
from adapterkit.kernels.quant.stochastic import Draws

METHODS = registry.members("combinations")
NOT_ITSELF = {"iso_c", "iso_cts", "subspace_boost"}  # one adapter alone is not given back
ON_ELEMENTS = [name for name, record in METHODS.items() if record.acts_on == "elements"]


class Dense:
    """Deltas that are kept: float32 matrices, read in blocks of `height` rows."""

    def __init__(self, matrices: list[Tensor], height: int = 3):
        self.matrices, self.height = [m.float() for m in matrices], height
        self.count, self.shape = len(matrices), tuple(matrices[0].shape)
        self.dtype = torch.float32
        self.device = matrices[0].device

    def blocks(self) -> Iterator[tuple[int, int]]:
        return (
            (first, min(first + self.height, self.shape[0]))
            for first in range(0, self.shape[0], self.height)
        )

    def rows(self, which: int, first: int, last: int) -> Tensor:
        return self.matrices[which][first:last].clone()


def seeds(which: int) -> Draws:
    return Draws.of(100, str(which))


def drawn(shape: torch.Size, which: int) -> Tensor:
    """A number between 0 and 1 for each element of a delta."""
    return seeds(which).uniform(shape.numel(), torch.device("cpu")).view(shape)


def record(name: str, **given):
    """The method with what was given of the options it has, and 0.4 for those it needs."""
    fields = registry.options(METHODS[name])
    needed = {key: 0.4 for key, field in fields.items() if field.default is dataclasses.MISSING}
    return METHODS[name](**needed | {key: value for key, value in given.items() if key in fields})


def covariance_of(delta: Tensor) -> Tensor:
    """What the layer saw with the adapter of this delta, (in, in) float32: different for each
    delta, and correlated."""
    return (torch.eye(delta.shape[1]) + delta.T @ delta).float()


def applied(
    method, products: list[Product], weights, seeds=seeds, height=3
) -> tuple[Product | Tensor, dict[str, float]]:
    """What a method gives, as factors or dense, and its metrics."""
    if method.acts_on == "factors":
        return method.combine_factors(products, weights, seeds)
    if method.acts_on == "covariances":
        covariances = lambda which: covariance_of(products[which].dense())
        result, _, metrics = method.combine_covariances(products, weights, covariances)
        return result, metrics
    return method.combine_elements(Dense([p.dense() for p in products], height), weights, seeds)


def combined(method, products: list[Product], weights, seeds=seeds, height=3) -> Tensor:
    """The delta that a method gives, in float64."""
    result, _ = applied(method, products, method.resolve_weights(weights), seeds, height)
    return result.dense() if isinstance(result, Product) else result.double()


def product(out: int, inside: int, rank: int, seed: int, kind: str = "normal") -> Product:
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((out, rank), (rank, inside))
    )
    if kind == "bf16":
        left, right = left.bfloat16().double(), right.bfloat16().double()
    if kind == "repeated":
        left, right = left.round().clamp(-1, 1), right.round().clamp(-1, 1)
    return Product(left * (kind != "zero"), right)


def case(out: int, inside: int, *parts: tuple[int, str]) -> list[Product]:
    return [product(out, inside, rank, 10 * i + out, kind) for i, (rank, kind) in enumerate(parts)]


HARD = {
    "1x1": case(1, 1, (1, "normal"), (1, "normal")),
    "1x3": case(1, 3, (1, "normal"), (1, "normal"), (1, "bf16")),
    "3x1": case(3, 1, (1, "normal"), (1, "normal")),
    "rank one": case(6, 9, (1, "normal"), (1, "normal")),
    "full rank": case(5, 8, (5, "normal"), (5, "normal"), (5, "normal")),
    "ranks differ": case(12, 7, (1, "normal"), (3, "normal"), (5, "bf16")),
    "a zero": case(7, 9, (2, "normal"), (2, "zero"), (3, "normal")),
    "zero and one": case(7, 9, (2, "zero"), (3, "normal")),
    "zeros": case(4, 5, (2, "zero"), (2, "zero")),
    "repeated": case(9, 11, (2, "repeated"), (3, "repeated"), (2, "repeated")),
    "bf16": case(16, 24, (4, "bf16"), (4, "bf16"), (4, "bf16"), (4, "bf16")),
    "the same twice": [product(6, 8, 2, 1)] * 2,
    "pair": case(10, 14, (3, "normal"), (4, "normal")),
}
WEIGHTS = [0.7, 1.6, 0.4, 1.1]

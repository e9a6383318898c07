"""Factors of a delta without the intruder dimensions that it adds to its base's weight."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from adapterkit.adapters.kinds.dora_deltas import BaseWeights
from adapterkit.adapters.kinds.intruders import intruders_of, weight_of
from adapterkit.core.adapter.factors import Factors, Place
from adapterkit.core.errors import Problems
from adapterkit.core.plan import READ, TaskResult
from adapterkit.core.weights.parameters import StoredParameter
from adapterkit.core.weights.reader import Reader
from adapterkit.kernels.lowrank import intruders, weighted
from adapterkit.verbs.combine.tasks.truncate import FittedFactors
from adapterkit.verbs.shared.statistics_file import read_root, root_memory

SVD_BYTES = 80  # per element, at most: the weight, the sum, their factors, and LAPACK's workspace


@dataclass(frozen=True)
class ReducedFactors(FittedFactors):
    """Fitted factors of delta - share * Σ s u vᵀ over its intruder dimensions."""

    factors: Factors = field(metadata=READ)
    weight: StoredParameter = field(metadata=READ)
    share: float

    @property
    def full_rank(self) -> int:
        return min(self.factors.rank + intruders.TOP, *self.factors.shape)

    @property
    def memory(self) -> int:
        return SVD_BYTES * math.prod(self.factors.shape) + root_memory(self.covariance)

    def compute(self, inputs: Reader) -> TaskResult:
        root, damping = read_root(inputs, self.covariance)
        found = intruders_of(self.factors, self.weight, inputs)
        (product,) = self.factors.products(inputs)
        reduced = intruders.without(product, found, self.share)
        metrics = {"intruders": len(found.s), **damping}
        return self.fit([weighted.decompose_product(reduced, root)], metrics)


def reduced(
    weights: BaseWeights,
    joined: Mapping[str, Factors],
    dtype: str,
    share: float,
    errors: Problems,
    **how: Any,  # truncation and alpha
) -> Iterator[ReducedFactors]:
    """The tasks of a LoRA's modules, by the names of their factors."""
    for name, factors in joined.items():
        with errors.collected():
            weight = weight_of(weights, factors)
            kind = "embedding" if factors.kind == "embedding" else "module"
            place = Place.of_weight(factors.module, weight.weight_shape, kind)
            yield ReducedFactors(name, place, dtype, factors, weight, share, **how)

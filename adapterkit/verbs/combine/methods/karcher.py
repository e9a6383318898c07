"""karcher: the mean direction of the deltas on the sphere, with their mean length."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from adapterkit.core.errors import Refused
from adapterkit.core.lazy import Tensor, torch
from adapterkit.kernels.lowrank.algebra import Product, gram, stack_products
from adapterkit.verbs.combine.methods.common import check_count
from adapterkit.verbs.combine.methods.protocol import Metrics, OnFactors, Seeds

ROUNDS = 1000


@dataclass(frozen=True)
class Karcher(OnFactors):
    """Δ' = Σᵢ pᵢ‖Δᵢ‖ · argmin_‖u‖=1 Σᵢ pᵢ θ(u, Δᵢ / ‖Δᵢ‖)², pᵢ = wᵢ / Σⱼ wⱼ, θ the angle.

    Its rank is Σ rᵢ. u ← exp_u(Σᵢ pᵢ log_u(Δᵢ / ‖Δᵢ‖)), in coefficients of the deltas, from their
    normalized mean, until a step is at most 1e-10; refused after 1000 steps. (mergekit: ten steps
    in float32, or until 1e-5.)

    Deltas of 0 have no direction and count in the mean length only. Raises `Refused` for negative
    weights, and for deltas without a mean: opposite ones (1 + cos < 1e-12), or ones balanced around
    0."""

    name = "karcher"
    source = "Karcher 1977, doi:10.1002/cpa.3160300502"
    acts_on = "factors"
    stacks = True

    def check_weights(self, weights: Sequence[float]) -> None:
        if min(weights) < 0 or sum(weights) == 0:
            raise Refused(
                f"weights {', '.join(f'{w:g}' for w in weights)}",
                expected="shares: none below 0, not all 0",
                where="--method karcher",
                hint="change the weights, or use linear",
                code="AK107",
            )

    def combine_factors(
        self, products: Sequence[Product], weights: Sequence[float], seeds: Seeds
    ) -> tuple[Product, Metrics]:
        check_count(weights, len(products))
        self.check_weights(weights)
        shares = torch.tensor(weights, dtype=torch.float64) / sum(weights)
        table = gram(products)
        norms = table.diagonal().clamp_min(0).sqrt()
        used = [i for i, weight in enumerate(weights) if weight and norms[i] > 0]
        units = torch.zeros_like(norms)
        steps = 0
        if used:
            cosines = table[used][:, used] / norms[used, None] / norms[used]
            _check_opposites(cosines, used)
            mean, steps = _mean(cosines, shares[used] / shares[used].sum())
            units[used] = mean / norms[used]
        lengths = (units * (shares @ norms)).tolist()
        return stack_products(products, lengths), {"steps": float(steps)}


def _check_opposites(cosines: Tensor, used: list[int]) -> None:
    opposite = (cosines + 1 < 1e-12).nonzero().tolist()
    if opposite:
        first, second = (used[i] + 1 for i in opposite[0])
        raise _refusal(f"deltas of adapters {first} and {second} in opposite directions")


def _mean(
    cosines: Tensor,  # (k, k) of the unit deltas
    shares: Tensor,  # (k,)
) -> tuple[Tensor, int]:
    """The coefficients (k,) of the mean on the unit sphere, and the number of steps; `Refused` if
    there is no mean."""
    point = shares / _length(shares, cosines, at_least=1e-6)
    for step in range(ROUNDS):
        dots = (cosines @ point).clamp(-1, 1)
        angles = dots.acos()
        if float(dots.min() + 1) < 1e-12:
            break
        pull = shares * torch.where(angles > 1e-9, angles / angles.sin().clamp_min(1e-300), 1)
        tangent = pull - (pull @ dots) * point  # Σ pull (unit - dot · point)
        length = _length(tangent, cosines)
        if length <= 1e-10:
            return point, step
        point = math.cos(length) * point + math.sin(length) / length * tangent
        point = point / _length(point, cosines)
    raise _refusal(f"deltas whose mean direction does not converge in {ROUNDS} steps")


def _length(
    coefficients: Tensor,  # (k,)
    cosines: Tensor,  # (k, k)
    at_least: float = 0.0,
) -> float:
    """‖Σ coefficientᵢ unitᵢ‖."""
    length = max(float(coefficients @ cosines @ coefficients), 0.0) ** 0.5
    if length < at_least:
        raise _refusal("deltas that cancel each other")
    return length


def _refusal(problem: str) -> Refused:
    return Refused(
        problem,
        expected="directions that have a mean",
        where="--method karcher",
        hint="use linear, or fewer adapters",
        code="AK107",
    )

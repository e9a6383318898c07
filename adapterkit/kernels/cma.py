"""CMA-ES (Hansen, arXiv:1604.00772): minimize a function of few variables without gradients.

The search proposes a generation and then receives its values. Draws depend only on the seed and the
generation's number, so an interrupted search repeats the same points.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from adapterkit.kernels import dense


@dataclass
class Cma:
    """The search: points are drawn from N(mean, step² C), and the better half of them, weighted by
    rank, moves the mean and shapes C; paths of the mean's moves lengthen or shorten the step.
    Points outside the bounds are clipped to them, and evaluated there."""

    mean: Tensor  # (n,) float64
    step: float
    low: float = -math.inf
    high: float = math.inf
    seed: int = 0
    generation: int = 0
    covariance: Tensor = field(init=False)  # (n, n)
    path: Tensor = field(init=False)  # of the mean, for C
    conjugate: Tensor = field(init=False)  # of the mean, as if C were 1, for the step

    def __post_init__(self) -> None:
        n = len(self.mean)
        self.mean = self.mean.double()
        self.covariance = torch.eye(n, dtype=torch.float64)
        self.path, self.conjugate = torch.zeros_like(self.mean), torch.zeros_like(self.mean)
        self.size = 4 + int(3 * math.log(n))  # of a generation
        ranks = torch.arange(1, self.size // 2 + 1, dtype=torch.float64)
        weights = math.log((self.size + 1) / 2) - ranks.log()
        self.weights = weights / weights.sum()
        self.selected = mu = 1 / float(self.weights.square().sum())  # as if so many were averaged
        self.rate_path = (4 + mu / n) / (n + 4 + 2 * mu / n)
        self.rate_step = (mu + 2) / (n + mu + 5)
        self.rate_one = 2 / ((n + 1.3) ** 2 + mu)
        self.rate_ranks = min(1 - self.rate_one, 2 * (mu - 2 + 1 / mu) / ((n + 2) ** 2 + mu))
        self.damping = 1 + 2 * max(0.0, math.sqrt((mu - 1) / (n + 1)) - 1) + self.rate_step
        self.length = math.sqrt(n) * (1 - 1 / (4 * n) + 1 / (21 * n * n))  # of a normal vector

    def ask(self) -> Tensor:
        """The points (size, n) of the next generation."""
        generator = torch.Generator().manual_seed((self.seed << 20) + self.generation)
        z = torch.randn(self.size, len(self.mean), generator=generator, dtype=torch.float64)
        values, vectors = dense.eigh(self.covariance)
        y = (z * values.clamp_min(0).sqrt()) @ vectors.T
        return (self.mean + self.step * y).clamp(self.low, self.high)

    def tell(
        self,
        points: Tensor,  # (size, n), as asked for
        values: Tensor,  # (size,), the smaller the better
    ) -> None:
        n = len(self.mean)
        moves = (points[values.argsort(stable=True)] - self.mean) / self.step
        best = moves[: len(self.weights)]
        move = self.weights @ best
        self.mean = self.mean + self.step * move
        values, vectors = dense.eigh(self.covariance)
        whitened = vectors @ ((vectors.T @ move) / values.clamp_min(1e-300).sqrt())
        rate, kept = self.rate_step, (1 - self.rate_step) ** (2 * (self.generation + 1))
        self.conjugate = (1 - rate) * self.conjugate + self._blend(rate) * whitened
        length = float(self.conjugate.norm())
        # a step that is too short is lengthened before C is
        steady = length / math.sqrt(1 - kept) < (1.4 + 2 / (n + 1)) * self.length
        rate = self.rate_path
        self.path = (1 - rate) * self.path + steady * self._blend(rate) * move
        lost = (1 - steady) * rate * (2 - rate)
        shrunk = 1 - self.rate_one - self.rate_ranks + self.rate_one * lost
        ranked = (best * self.weights[:, None]).T @ best
        one = torch.outer(self.path, self.path)
        total = shrunk * self.covariance + self.rate_one * one + self.rate_ranks * ranked
        self.covariance = (total + total.T) / 2
        self.step *= math.exp(self.rate_step / self.damping * (length / self.length - 1))
        self.generation += 1

    def _blend(self, rate: float) -> float:
        return math.sqrt(rate * (2 - rate) * self.selected)

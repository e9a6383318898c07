"""Coefficients that minimize a balanced loss, in groups that move together, and the standard error
of a difference of two losses."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

SOFT = 0.05  # nats: files this much below the worst count e times less
STEPS = 10
ENOUGH = 3e-4  # of the loss at the start: a step that lowers it less is the last one,
SHARE = 0.02  # and one that lowers it by less than this share of what all before did
FIRST = 0.1  # root mean square of the first change of coefficients, of no known curvature
TRIES = 6  # lengths along a direction
ARMIJO = 1e-4


@dataclass(frozen=True)
class Balance:
    """The function that combines the losses of files (files,) into one: see `balance` of fit.
    `files` (samples,): numbers of the samples' files; `weights` (samples,): their shares of these;
    `shares` (files,), which sum to 1: of the files in a mean over them; `own` and `base`: for each
    file the loss of its adapter and of the base, for `retention`."""

    is_worst: bool
    files: Tensor
    weights: Tensor
    shares: Tensor
    own: Tensor | float = 0.0
    base: Tensor | float = 1.0

    def by_file(self, losses: Tensor) -> Tensor:
        """The losses of the files, in nats per token, from losses (samples,)."""
        return losses.new_zeros(len(self.shares)).index_add(0, self.files, self.weights * losses)

    def of_files(self, by_file: Tensor) -> Tensor:
        if self.is_worst:
            return SOFT * torch.logsumexp(by_file / SOFT, 0)
        return self.shares @ ((by_file - self.own) / (self.base - self.own))

    def value(self, losses: Tensor) -> float:
        """The objective's value for losses (samples,)."""
        return float(self.of_files(self.by_file(losses)))

    def slopes(self, losses: Tensor) -> Tensor:
        """d value / d by_file (files,)."""
        return torch.func.grad(self.of_files)(self.by_file(losses))

    def error(self, before: Tensor, after: Tensor) -> float:
        """The standard error of value(before) - value(after), of paired samples: within files, or
        over all samples if a file has only one."""
        weights = self.slopes(before)[self.files] * self.weights
        has_pairs = int(self.files.bincount().min()) > 1
        groups = self.files if has_pairs else torch.zeros_like(self.files)
        change, total = before - after, 0.0
        for number in groups.unique():
            its = groups == number
            spread = weights[its] * (change[its] - change[its].mean())
            total += float(spread.square().sum()) * len(spread) / (len(spread) - 1)
        return math.sqrt(total)


@dataclass(frozen=True)
class Point:
    """An evaluated point: c (coefficients,), the balanced loss in nats, its gradient
    (coefficients,) and those of the files' losses (files, coefficients)."""

    c: Tensor
    value: float
    gradient: Tensor
    by_file: Tensor

    @classmethod
    def of(cls, c: Tensor, balance: Balance, losses: Tensor, by_file: Tensor) -> "Point":
        """The point with losses (samples,) of the balance's split and the files' gradients."""
        return cls(c, balance.value(losses), balance.slopes(losses) @ by_file, by_file)


@dataclass(frozen=True)
class Level:
    """c = bounded(before + δ[groups]), groups (coefficients,); λ/2 Σ k δ² is added to the loss, k
    the share of an adapter's coefficients that a group has. The variable is x = √k δ (groups,)."""

    before: Tensor
    groups: Tensor
    shares: Tensor  # k (groups,)
    ridge: float
    low: float
    high: float

    def c(self, x: Tensor) -> Tensor:
        return (self.before + (x / self.shares.sqrt())[self.groups]).clamp(self.low, self.high)

    def x(self, change: Tensor) -> Tensor:
        """x for a change of c: the mean over each group, scaled."""
        return self._sums(change) / self.groups.bincount() * self.shares.sqrt()

    def is_of(self, x: Tensor, point: Point) -> bool:
        return torch.allclose(self.c(x), point.c, rtol=0, atol=1e-9)

    def value(self, x: Tensor, point: Point) -> float:
        return point.value + self.ridge * float(x @ x) / 2

    def slope(self, x: Tensor, point: Point) -> tuple[Tensor, Tensor]:
        """d value / d x, and which x are free: those not at a bound that the step would cross."""
        low, high = point.c <= self.low, point.c >= self.high
        counts = self.groups.bincount()
        at_low, at_high = (self._sums(at.double()) == counts for at in (low, high))
        is_stuck = (low | high) & ~(at_low | at_high)[self.groups]  # others of its group are free
        slope = self._by_x(point.gradient.masked_fill(is_stuck, 0)) + self.ridge * x
        return slope, ~(at_low & (slope > 0) | at_high & (slope < 0))

    def direction(self, slope: Tensor, free: Tensor, seen: Sequence[Point]) -> Tensor:
        """-H·slope of L-BFGS (Nocedal 1980) for the free variables, H the inverse curvature. It
        comes from consecutive points of any level; before any, from the size of each group's
        gradients: 1 / (1 + mean of squares by file and point, relative to that of all groups)."""
        pairs = []
        for p, q in pairwise(seen):
            s = self.x(q.c - p.c)
            y = self._by_x(q.gradient - p.gradient) + self.ridge * s
            s, y = s * free, y * free
            if float(s @ y) > 1e-10 * float(y @ y):
                pairs.append((s, y))
        d, parts = -slope * free, []
        if not pairs:
            return d * (FIRST * float(self.shares.sum().sqrt() / d.norm().clamp_min(1e-30)))
        for s, y in reversed(pairs):
            parts.append(float(s @ d) / float(s @ y))
            d = d - parts[-1] * y
        squares = torch.cat([self._by_x(point.by_file) for point in seen]).square().mean(0)
        inverse = 1 / (1 + squares / squares.mean())
        s, y = pairs[-1]
        d = d * inverse * (float(s @ y) / float(y * inverse @ y))
        for (s, y), part in zip(pairs, reversed(parts), strict=True):
            d = d + (part - float(y @ d) / float(s @ y)) * s
        return d * free

    def _by_x(self, gradient: Tensor) -> Tensor:
        """Gradients by x, from gradients by c (..., coefficients)."""
        return self._sums(gradient) / self.shares.sqrt()

    def _sums(self, values: Tensor) -> Tensor:
        zeros = values.new_zeros(*values.shape[:-1], len(self.shares))
        return zeros.index_add(-1, self.groups, values)


def minimize(
    level: Level,
    seen: list[Point],
    evaluate: Callable[[Tensor], Point],
    *,
    enough: float = ENOUGH,
    share: float = SHARE,
    steps: int = STEPS,
) -> Point:
    """The least of a level's loss by L-BFGS with Armijo searches, from the best of `seen`, to which
    the points of `evaluate` are added: one history for all levels and ridges.

    On SmolLM2-135M with three adapters and 9 samples, gradients up to the end of one number for
    each adapter, layer and module: 4, 8, 13, to 3.081 nats; with `torch.optim.LBFGS`, from each
    level's start, 6, 16, 28, to 3.124. Damped steps of the empirical Fisher of samples needed more.
    """

    def look(x: Tensor) -> tuple[float, Tensor, Point]:
        point = evaluate(level.c(x))
        if math.isfinite(point.value):
            seen.append(point)
        back = level.x(point.c - level.before)  # not beyond a bound, which x could not leave again
        x = back if level.is_of(back, point) else x
        return level.value(x, point), x, point

    known = [(level.x(one.c - level.before), one) for one in seen]
    starts = [(level.value(x, one), x, one) for x, one in known if level.is_of(x, one)]
    best = min(starts, key=lambda one: one[0]) if starts else look(torch.zeros_like(level.shares))
    first, least = best[0], enough * abs(seen[0].value) if seen else 0.0
    for _ in range(steps):
        value, x, point = best
        slope, free = level.slope(x, point)
        d, t = level.direction(slope, free, seen), 1.0
        for _ in range(TRIES if -float(slope @ d) / 2 > least else 0):
            after = look(x + t * d)
            fall = max(0.0, float(slope @ (x - after[1])))
            if after[0] <= value - ARMIJO * fall:
                best = after
                break
            t *= min(0.5, max(0.1, fall / (2 * (after[0] - value + fall))))  # of the parabola
        if value - best[0] < max(least, share * (first - best[0])):
            break
    return best[2]

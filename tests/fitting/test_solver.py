"""The least of a level's loss, and what the points of other levels save."""

import pytest
import torch

from adapterkit.verbs.fit.solver import FIRST, Level, Point, minimize

MODULES, ADAPTERS = 40, 3


class Bowl:
    """(c - t)ᵀ A (c - t) / 2, half of it of each of two files; sizes of modules spread over 30."""

    def __init__(self, seed=0):
        generator = torch.Generator().manual_seed(seed)
        draw = lambda *shape: torch.randn(shape, generator=generator).double()
        count = MODULES * ADAPTERS
        sizes = 10 ** (1.5 * torch.rand(MODULES, generator=generator).double() - 1)
        half = draw(count, count) * sizes.repeat_interleave(ADAPTERS) / count**0.5
        self.curvature = half.T @ half + 0.01 * torch.eye(count).double()
        self.target = 0.3 + 0.3 * draw(count)
        self.evaluations = 0

    def __call__(self, c):
        self.evaluations += 1
        apart = c - self.target
        pull = self.curvature @ apart
        return Point(c, float(apart @ pull) / 2, pull, torch.stack([pull / 2, pull / 2]))

    def level(self, per, before, ridge, low=-10.0, high=10.0):
        numbers = torch.arange(MODULES * ADAPTERS)
        groups = {"adapter": numbers % ADAPTERS, "module": numbers}[per]
        shares = groups.bincount().double() / MODULES
        return Level(before, groups, shares, ridge, low, high)

    def solution(self, level):
        """Of the normal equations, in δ of each group."""
        one = torch.eye(len(level.shares)).double()[level.groups]
        matrix = one.T @ self.curvature @ one + level.ridge * level.shares.diag()
        delta = torch.linalg.solve(matrix, one.T @ self.curvature @ (self.target - level.before))
        return level.before + one @ delta


@pytest.fixture
def bowl():
    return Bowl()


@pytest.fixture
def start():
    return torch.full((MODULES * ADAPTERS,), 1 / ADAPTERS).double()


@pytest.mark.parametrize("per", ["adapter", "module"])
@pytest.mark.parametrize("ridge", [0.0, 0.1])
def test_the_least_of_a_quadratic(bowl, start, per, ridge):
    level = bowl.level(per, start, ridge)
    found = minimize(level, [], bowl, enough=1e-15, share=0, steps=500)
    least = bowl(bowl.solution(level))
    value = lambda point: level.value(level.x(point.c - start), point)
    assert value(found) == pytest.approx(value(least), rel=1e-6, abs=1e-10)


def test_bounds_hold_and_can_be_left(bowl, start):
    """A coefficient at a bound moves back where the loss falls inside."""
    low, high = 0.0, 0.5
    level = bowl.level("module", start, 0.0, low, high)
    found = minimize(level, [], bowl, enough=1e-15, share=0, steps=500)
    assert found.c.min() >= low and found.c.max() <= high
    g, inside = found.gradient, (found.c > low) & (found.c < high)
    assert inside.any() and not inside.all()
    out = torch.where(found.c <= low, g.clamp_max(0), g.clamp_min(0))
    assert g[inside].abs().max() < 1e-5 and out[~inside].abs().max() < 1e-5
    level = bowl.level("module", torch.full_like(start, high), 0.0, low, high)
    again = minimize(level, [], bowl, enough=1e-15, share=0, steps=500)
    assert again.value == pytest.approx(found.value, rel=1e-5)


def test_the_first_step_is_of_a_known_size(bowl, start):
    level, seen = bowl.level("adapter", start, 0.0), []
    minimize(level, seen, bowl, steps=1)
    change = seen[1].c - seen[0].c
    assert float(change.square().mean().sqrt()) == pytest.approx(FIRST)


def test_a_level_begins_with_the_best_that_coarser_ones_saw(bowl, start):
    """Which costs nothing; all that it sees itself is kept for the next."""
    seen = []
    coarse = minimize(bowl.level("adapter", start, 0.1), seen, bowl)
    count, level = bowl.evaluations, bowl.level("module", start, 0.1)
    assert len(seen) == count and minimize(level, seen, bowl, steps=0) is coarse
    assert bowl.evaluations == count
    found = minimize(level, seen, bowl, enough=1e-4, share=0, steps=40)
    assert found.value < coarse.value and len(seen) == bowl.evaluations > count
    other = minimize(level, [], Bowl(), enough=1e-4, share=0, steps=40)
    assert found.value == pytest.approx(other.value, abs=2e-3)


def test_points_that_a_level_cannot_have_are_no_start(bowl, start):
    seen = []
    fine = minimize(bowl.level("module", start, 0.0), seen, bowl, steps=40)
    level = bowl.level("adapter", start, 0.0)
    coarse = minimize(level, seen, bowl, steps=40)
    assert fine.value < coarse.value
    assert coarse.c.reshape(MODULES, ADAPTERS).std(0).max() == 0

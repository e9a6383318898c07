"""Metrics of one changed tensor, measured on sampled chunks while they are written."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from adapterkit.plan import Step


@dataclass
class TensorMetrics:
    """What is measured of one changed tensor."""

    delta: float | None = None
    squares: list[float] = field(default_factory=list)  # per chunk, Σ of the written values squared
    sampled: int = 0
    changed: int = 0  # of the sampled elements, how many differ from the base's
    before: list[float] = field(default_factory=list)  # per sampled chunk, Σ base²
    lost: list[float] = field(default_factory=list)  # per sampled chunk, Σ (rounded - exact)²
    moved: list[float] = field(default_factory=list)  # per sampled chunk, Σ (exact - base)²
    # per sampled chunk, Σ (rounded - base)(exact - base)
    projection: list[float] = field(default_factory=list)

    def add(self, other: "TensorMetrics") -> None:
        self.squares += other.squares
        self.sampled += other.sampled
        self.changed += other.changed
        self.before += other.before
        self.lost += other.lost
        self.moved += other.moved
        self.projection += other.projection

    def count(self, sums: list[float], elements: int) -> None:
        """One chunk's `chunk_sums`."""
        squares, *sampled = sums
        self.squares.append(squares)
        if sampled:
            changed, before, lost, moved, projection = sampled
            self.sampled += elements
            self.changed += int(changed)
            self.before.append(before)
            self.lost.append(lost)
            self.moved.append(moved)
            self.projection.append(projection)

    def result(self, step: Step) -> dict:
        # fsum is exact, so the order in which the workers came does not show
        norm, lost, moved = math.sqrt(_sum(self.squares)), _sum(self.lost), _sum(self.moved)
        metrics: dict = {"adapters": list(step.adapters)} if step.adapters else {}
        if self.delta is not None and norm:
            metrics["delta"] = _short(self.delta / norm)
        if self.sampled:
            metrics["changed"] = _short(self.changed / self.sampled)
        # else the delta lies in other rows than those that were sampled
        if self.sampled and (moved or not self.delta):
            metrics["rounding"] = _short(math.sqrt(lost / moved)) if moved else 0.0
            metrics["survived"] = _short(_sum(self.projection) / moved) if moved else 1.0
        if step.measures_error:
            size = _sum(self.before)
            metrics["error"] = _short(math.sqrt(lost / size)) if size else 0.0
        return finite_metrics(metrics)


def finite_metrics(metrics: dict[str, Any]) -> dict[str, Any]:
    """Metrics without those that are not finite: sums of absurd values overflow."""
    return {
        name: value
        for name, value in metrics.items()
        if not any(
            isinstance(one, float) and not math.isfinite(one)
            for one in (value if isinstance(value, list) else [value])
        )
    }


def _sum(values: Iterable[float]) -> float:
    """NaN where there is none: of infinities of both signs, and where it overflows."""
    try:
        return math.fsum(values)
    except (OverflowError, ValueError):
        return math.nan


def chunk_sums(
    w: Tensor,  # the new values
    written: Tensor,  # as they were rounded
    compared: tuple[Tensor, Tensor]
    | None,  # a sampled chunk: the base's values, the exact new ones
) -> list[Tensor]:
    """The sums of one chunk, each a tensor of its device without dimensions: none is waited for."""
    sums = [_squares(w)]
    if compared is None:
        return sums
    before, exact = compared
    rounded = written.to(exact.dtype)
    delta = exact - before
    return [
        *sums,
        (rounded != before).sum(),
        _squares(before),
        _squares(exact - rounded),
        _squares(delta),
        torch.dot((rounded - before).view(-1), delta.view(-1)),
    ]


def _squares(values: Tensor) -> Tensor:
    flat = values.view(-1)
    return torch.dot(flat, flat)


def _short(value: float) -> float:
    return float(f"{value:.4g}")

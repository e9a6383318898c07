"""Measure changed tensors: sums over chunks while they are written, and the receipt's metrics."""

import math
from dataclasses import dataclass, field
from functools import reduce

from adapterkit.core.lazy import Tensor, torch
from adapterkit.core.plan import Loaded, Metrics, Step
from adapterkit.kernels.block_sizes import piece
from adapterkit.kernels.sums import exact_sum, floats

PIECE = 1 << 15  # elements compared at a time, so that their differences stay in a CPU's cache


@dataclass
class ChangeMetrics:
    """The share of a change Δ = exact - before that is kept in the written values.

    `survived`: ⟨written - before, Δ⟩ / ‖Δ‖², 1 if all of it is kept, 0 if nothing changed. The
    noise is ‖written - exact‖ / ‖Δ‖; the `error`, if a step wants it, ‖written - exact‖ / ‖before‖.
    `delta` becomes relative to the norm whose `squares` are given."""

    delta: float | None = None  # the norm of the additions
    squares: list[float] = field(default_factory=list)
    sums: list[list[float]] = field(default_factory=list)  # `change_sums` of each compared chunk
    sampled: int = 0  # number of compared elements, if not all

    def add(self, other: "ChangeMetrics") -> None:
        self.squares += other.squares
        self.sums += other.sums
        self.sampled += other.sampled

    def compare(self, before: Tensor, exact: Tensor, written: Tensor) -> None:
        """Measure some rows."""
        self.sums.append(floats(change_sums(before, exact, written)))

    def result(self, step: Step, noise: str = "rounding", digits: int = 6) -> Metrics:
        # fsum is exact, so the order of the workers does not matter
        columns = zip(*self.sums, strict=True) if self.sums else [()] * 5
        changed, size, lost, moved, projection = map(exact_sum, columns)
        norm = math.sqrt(exact_sum(self.squares))
        metrics: Metrics = {"adapters": list(step.adapters)} if step.adapters else {}
        if self.delta is not None and norm:
            metrics["delta"] = short(self.delta / norm, digits)
        lost_share, survived = 0.0, 1.0
        if moved:
            lost_share = short(math.sqrt(lost / moved), digits)
            survived = short(projection / moved, digits)
        if self.sampled:
            metrics["changed"] = short(changed / self.sampled, digits)
            if moved or not self.delta:  # else the delta is in rows that were not sampled
                metrics |= {noise: lost_share, "survived": survived}
        elif self.sums:
            metrics |= {"survived": survived, **({noise: lost_share} if moved else {})}
        if step.measures_error:
            metrics["error"] = short(math.sqrt(lost / size), digits) if size else 0.0
        return finite_metrics(metrics)


def change_sums(before: Tensor, exact: Tensor, written: Tensor) -> list[Tensor]:
    """The number of elements that differ from before, ‖before‖², ‖written - exact‖², ‖Δ‖² and
    ⟨written - before, Δ⟩, each a tensor without dimensions on its device, without
    synchronization."""
    size = piece(before.device, PIECE)
    pieces = (rows.reshape(-1).split(size) for rows in (before, exact, written))
    sums = [_sums_of_piece(*three) for three in zip(*pieces, strict=True)]
    return [reduce(torch.add, column) for column in zip(*sums, strict=True)]


def _sums_of_piece(before: Tensor, exact: Tensor, written: Tensor) -> list[Tensor]:
    written = written.to(exact.dtype)
    delta, moved = exact - before, written - before
    return [
        torch.count_nonzero(moved.bool()),  # counting floats takes ten times as long on CPUs
        squares(before),
        squares(exact - written),
        squares(delta),
        torch.dot(moved, delta),
    ]


def squares(values: Tensor) -> Tensor:
    flat = values.view(-1)
    return torch.dot(flat, flat)


def delta_norm(edits: list[Loaded]) -> float | None:
    """The norm of the additions of edits, if it is known."""
    norms = [edit.delta_norm for edit in edits if edit.delta_norm is not None]
    return math.hypot(*norms) if norms else None


def finite_metrics(metrics: Metrics) -> Metrics:
    """Metrics without those that are not finite, because sums of absurd values overflow."""
    return {
        name: value
        for name, value in metrics.items()
        if not any(
            isinstance(one, float) and not math.isfinite(one)
            for one in (value if isinstance(value, list) else [value])
        )
    }


def short(value: float, digits: int = 6) -> float:
    """The value rounded to significant digits."""
    return float(f"{value:.{digits}g}")

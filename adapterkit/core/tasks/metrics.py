"""What is measured of a changed tensor: sums over chunks while they are written, and the metrics
that the receipt has of them."""

import math
from dataclasses import dataclass, field
from functools import reduce

from adapterkit.core.lazy import Tensor, torch
from adapterkit.core.plan import Loaded, Metrics, Step
from adapterkit.kernels.block_sizes import piece
from adapterkit.kernels.sums import exact_sum, floats

PIECE = 1 << 15  # elements compared at a time: on a CPU their differences stay in its cache


@dataclass
class ChangeMetrics:
    """How much of a change Δ = exact - before is in what is written.

    `survived`: ⟨written - before, Δ⟩ / ‖Δ‖², 1 if all of it is there, 0 if nothing moved. Beside it
    the noise, ‖written - exact‖ / ‖Δ‖; where a step asks for it ‖written - exact‖ / ‖before‖, the
    `error`. `delta` becomes relative to the norm whose `squares` are given.
    """

    delta: float | None = None  # the norm of what is added
    squares: list[float] = field(default_factory=list)
    sums: list[list[float]] = field(default_factory=list)  # of compared chunks, `change_sums`
    sampled: int = 0  # elements of these, where they are not all

    def add(self, other: "ChangeMetrics") -> None:
        self.squares += other.squares
        self.sums += other.sums
        self.sampled += other.sampled

    def compare(self, before: Tensor, exact: Tensor, written: Tensor) -> None:
        """Measure some rows."""
        self.sums.append(floats(change_sums(before, exact, written)))

    def result(self, step: Step, noise: str = "rounding", digits: int = 6) -> Metrics:
        # fsum is exact, so the order in which the workers came does not show
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
            if moved or not self.delta:  # else the delta lies in rows that were not sampled
                metrics |= {noise: lost_share, "survived": survived}
        elif self.sums:
            metrics |= {"survived": survived, **({noise: lost_share} if moved else {})}
        if step.measures_error:
            metrics["error"] = short(math.sqrt(lost / size), digits) if size else 0.0
        return finite_metrics(metrics)


def change_sums(before: Tensor, exact: Tensor, written: Tensor) -> list[Tensor]:
    """How many elements differ from before, ‖before‖², ‖written - exact‖², ‖Δ‖² and
    ⟨written - before, Δ⟩, each a tensor of its device without dimensions: none is waited for."""
    size = piece(before.device, PIECE)
    pieces = (rows.reshape(-1).split(size) for rows in (before, exact, written))
    sums = [_sums_of_piece(*three) for three in zip(*pieces, strict=True)]
    return [reduce(torch.add, column) for column in zip(*sums, strict=True)]


def _sums_of_piece(before: Tensor, exact: Tensor, written: Tensor) -> list[Tensor]:
    written = written.to(exact.dtype)
    delta, moved = exact - before, written - before
    return [
        torch.count_nonzero(moved.bool()),  # of floats it takes ten times as long on CPUs
        squares(before),
        squares(exact - written),
        squares(delta),
        torch.dot(moved, delta),
    ]


def squares(values: Tensor) -> Tensor:
    flat = values.view(-1)
    return torch.dot(flat, flat)


def delta_norm(edits: list[Loaded]) -> float | None:
    """The norm of what edits add, where it is known."""
    norms = [edit.delta_norm for edit in edits if edit.delta_norm is not None]
    return math.hypot(*norms) if norms else None


def finite_metrics(metrics: Metrics) -> Metrics:
    """Metrics without those that are not finite: sums of absurd values overflow."""
    return {
        name: value
        for name, value in metrics.items()
        if not any(
            isinstance(one, float) and not math.isfinite(one)
            for one in (value if isinstance(value, list) else [value])
        )
    }


def short(value: float, digits: int = 6) -> float:
    """Rounded to significant digits."""
    return float(f"{value:.{digits}g}")

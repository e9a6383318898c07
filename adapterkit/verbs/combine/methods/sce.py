"""sce: keep the elements in which the deltas differ most, weight the deltas by their squares, and
drop signs of the minority."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from adapterkit.core.lazy import Tensor, torch
from adapterkit.kernels import elementwise
from adapterkit.kernels.rows import add_column_squares
from adapterkit.verbs.combine.methods.common import check_count, check_share, conflict_metric
from adapterkit.verbs.combine.methods.protocol import Deltas, DenseDelta, OnElements, Seeds


@dataclass(frozen=True)
class Sce(OnElements):
    """Δ' = Σᵢ kᵢ ηᵢ wᵢ σᵢ / Σᵢ kᵢ ηᵢ, σᵢ = Δᵢ where selected, else 0, ηᵢ = ‖σᵢ‖² / Σⱼ ‖σⱼ‖², kᵢ =
    [sign(σᵢ) = sign of Σⱼ σⱼ].

    Selected are the int(select·m) elements with the largest variance over the deltas, m the number
    of elements whose variance is not 0. 0 counts as +.

    The paper has no weights; here they multiply the terms and do not count in ηᵢ or the election,
    so 1 each is the paper's. If the mean squares of all σᵢ add up to less than floor, all ηᵢ are
    equal (mergekit: 1e-6, above those of most adapters). If the deltas are equal everywhere, there
    is no variance, and all elements are kept (mergekit: none)."""

    select: float = 1.0
    floor: float = 0.0
    name = "sce"
    source = "arXiv:2408.07990"
    acts_on = "elements"

    def __post_init__(self):
        check_share("select", self.select)

    def combine_elements(
        self, deltas: Deltas, weights: Sequence[float], seeds: Seeds
    ) -> DenseDelta:
        check_count(weights, deltas.count)
        spread = _spread(deltas)  # overwritten with the result, block by block
        threshold = self._threshold(deltas, spread)
        if threshold.value >= 0:
            trim = elementwise.Trim(threshold)
            for first, last in deltas.blocks():
                trim(spread[first:last])
        else:
            spread.fill_(1)
        shares, overlaps, conflicts = _shares(deltas, spread, self.floor), 0, 0
        for first, last in deltas.blocks():
            blocks = _selected(deltas, spread, first, last)
            counts = elementwise.elect(blocks, weights, "total", spread[first:last], shares)
            overlaps, conflicts = overlaps + counts[0], conflicts + counts[1]
        return DenseDelta(spread, conflict_metric(overlaps, conflicts))

    def _threshold(self, deltas: Deltas, spread: Tensor) -> elementwise.Threshold:
        """The threshold of the selected deviations; below all of them at select 1, or if all are
        0."""
        nonzero = int(torch.count_nonzero(spread))
        if self.select == 1 or not nonzero:
            return elementwise.Threshold(-1.0)
        return elementwise.top_k_threshold(
            lambda: (spread[first:last] for first, last in deltas.blocks()),
            spread.numel(),
            int(self.select * nonzero),
            device=spread.device,
        )


def _spread(deltas: Deltas) -> Tensor:  # (out, in) float32
    """The standard deviation over the deltas, element by element: it has the order of the variance,
    without its underflow."""
    spread = torch.empty(deltas.shape, dtype=deltas.dtype, device=deltas.device)
    for first, last in deltas.blocks():
        blocks = [deltas.rows(i, first, last) for i in range(deltas.count)]
        elementwise.deviation(blocks, spread[first:last])
    return spread


def _selected(deltas: Deltas, selected: Tensor, first: int, last: int) -> list[Tensor]:
    mask = selected[first:last].sign()  # none is below 0; floats multiply faster than bools
    return [deltas.rows(i, first, last).mul_(mask) for i in range(deltas.count)]


def _shares(deltas: Deltas, selected: Tensor, floor: float) -> list[float]:
    """ηᵢ, summed exactly over the columns, so that the number of threads changes nothing; equal
    ones if the mean squares add up to less than `floor`."""
    columns = [
        torch.zeros(deltas.shape[1], dtype=torch.float64, device=selected.device)
        for _ in range(deltas.count)
    ]
    for first, last in deltas.blocks():
        for total, block in zip(columns, _selected(deltas, selected, first, last), strict=True):
            add_column_squares(block, total)
    squares = [math.fsum(total.tolist()) for total in columns]
    whole = math.fsum(squares)
    is_counted = whole and whole / selected.numel() >= floor
    return [square / whole if is_counted else 1 / len(squares) for square in squares]

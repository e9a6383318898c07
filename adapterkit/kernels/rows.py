"""Operations of merging on rows of a weight: low-rank additions, weight decomposition, and one
rounding at the end.

All functions work on a block of whole rows `w (n, cols)`, in place, in the dtype of `w` (float32 or
float64): each row's result depends on that row alone, so any way of cutting a weight into blocks
gives the same numbers.
"""

from adapterkit.core.lazy import Tensor, torch


def rows_of_chunk(columns: int, elements: int) -> int:
    """The number of rows with about that many elements, at least one."""
    return max(1, elements // max(columns, 1))


def row_ranges(rows: int, columns: int, elements: int) -> list[tuple[int, int]]:
    """Ranges of rows [first, last), in order, with about that many elements, at least one row."""
    step = rows_of_chunk(columns, elements)
    return [(first, min(first + step, rows)) for first in range(0, rows, step)]


def add_low_rank(
    w: Tensor,  # (n, cols), changed in place
    left: Tensor,  # (n, r), the scale folded in
    right: Tensor,  # (r, cols)
) -> None:
    """w += left @ right."""
    w.addmm_(left, right)


def row_norms(
    w: Tensor,  # (n, cols)
) -> Tensor:  # (n,) float64
    """‖w‖ of each row."""
    return torch.linalg.vector_norm(w, dim=1, dtype=torch.float64)


def scale_rows(
    w: Tensor,  # (n, cols), changed in place
    magnitude: Tensor,  # (n,)
    norm: Tensor,  # (n,) float64
) -> None:
    """w = magnitude * w / norm by rows (DoRA, arXiv:2402.09353, eq. 5)."""
    w.mul_((magnitude.double() / norm).to(w.dtype)[:, None])


def add_column_squares(
    w: Tensor,  # (n, cols)
    total: Tensor,  # (cols,) float64, changed in place
) -> None:
    """total += Σ_rows w², for norms over the other axis."""
    total.add_(torch.linalg.vector_norm(w, dim=0, dtype=torch.float64).square_())


def scale_columns(
    w: Tensor,  # (n, cols), changed in place
    magnitude: Tensor,  # (cols,)
    norm: Tensor,  # (cols,) float64, over all rows of the weight
) -> None:
    """w = magnitude * w / norm by columns."""
    w.mul_((magnitude.double() / norm).to(w.dtype))


def low_rank_norm(
    left: Tensor,  # (n, r)
    right: Tensor,  # (r, cols)
) -> float:
    """‖left @ right‖_F = sqrt(tr(leftᵀ·left · right·rightᵀ)), without forming the product;
    float64."""
    left, right = left.double(), right.double()
    return float(torch.sum((left.T @ left) * (right @ right.T)).clamp_min(0).sqrt())

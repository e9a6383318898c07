"""The trailing singular vectors of a dense matrix: the leading ones of its inverse."""

import torch
from torch import Tensor

from adapterkit.kernels import dense
from adapterkit.kernels.lowrank.algebra import Svd
from adapterkit.kernels.lowrank.truncated import truncated_svd

# of the largest value of the inverse that is asked for, the smallest one: beyond, float64 does not
# resolve it beside the largest
SPREAD = 1e-6
# of 1 / condition: below, the inverse has no correct digits to speak of
SINGULAR = 1e-13


def trailing_svd(
    w: Tensor,  # (n, m)
    rank: int,
) -> Svd:
    """The triplets of the min(rank, n, m) smallest singular values of w, falling, in float64.

    w or wᵀ = q l with l square: the smallest values of l are the reciprocals of l⁻¹'s largest, and
    those `truncated_svd` finds; where l is singular to float64's rounding, LAPACK decomposes it.
    Raises ValueError for a rank below 1.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, not {rank}")
    tall = w.shape[0] >= w.shape[1]
    matrix = w.double()
    q, triangle = dense.qr(matrix if tall else matrix.T)
    k = min(rank, len(triangle))
    u, s, vh = _inverted(triangle, k) or _decomposed(triangle, k)
    return Svd(q @ u, s, vh) if tall else Svd(vh.T, s, (q @ u).T)


def _inverted(triangle: Tensor, k: int) -> Svd | None:
    diagonal = triangle.diagonal().abs()
    if not float(diagonal.min()) > SINGULAR * float(diagonal.max()):
        return None
    one = torch.eye(len(triangle), dtype=triangle.dtype, device=triangle.device)
    inverse = torch.linalg.solve_triangular(triangle, one, upper=True)
    if not float(triangle.norm()) * float(inverse.norm()) * SINGULAR < len(triangle):
        return None
    svd = truncated_svd(inverse, k, tolerance=1e-7)
    if not float(svd.s[-1]) > SPREAD * float(svd.s[0]):
        return None
    # once more: what the iteration left of large values in v counts beside the small ones
    v, s, xh = dense.svd(inverse @ svd.vh.T)
    return Svd((svd.vh.T @ xh.T).flip(1), 1 / s.flip(0), v.T.flip(0))


def _decomposed(triangle: Tensor, k: int) -> Svd:
    u, s, vh = dense.svd(triangle)
    return Svd(u[:, -k:], s[-k:], vh[-k:])

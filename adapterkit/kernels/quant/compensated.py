"""Rounding with compensation: the error of each column of a weight goes into the columns that are
rounded after it, so that the outputs W x move least: ‖(W - Q) C^½‖_F with C = E[x xᵀ].

Reference: GPTQ, Frantar et al. 2022, arXiv:2210.17323, algorithm 1, with the columns in the order
of falling diagonals of C ("act-order"); the grid that values are rounded to is fixed before.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from adapterkit.kernels.block_sizes import piece
from adapterkit.kernels.lowrank.weighted import NOT_POSITIVE, normalized
from adapterkit.kernels.quant.grid import RoundColumn
from adapterkit.kernels.sums import floats

BLOCK = 128  # columns between which errors are carried one by one; to the rest by one product
DAMPING = 1e-2  # of the mean of C's diagonal, added to it: GPTQ's
ROWS = 1 << 8  # of a product for a norm on a CPU


class Factor(NamedTuple):
    """r (n, n) float64, upper triangular, with r rᵀ = C / mean(diag C) + DAMPING · 1, rows
    and columns of C in this order."""

    r: Tensor
    order: Tensor  # (n,) int64


def factorize(
    c: Tensor,  # (n, n) float32
) -> Factor:
    """The factor of a covariance: float64, n³/3 operations. Raises ValueError as `normalized`, and
    if it is not positive semidefinite."""
    order = torch.argsort(c.diagonal(), descending=True, stable=True)
    turned = order.flip(0)  # a lower factor of the reversed matrix, reversed, is an upper one
    damped = normalized(c)[turned][:, turned]
    damped.diagonal().add_(DAMPING)
    lower, failed = torch.linalg.cholesky_ex(damped)
    if int(failed):
        raise ValueError(NOT_POSITIVE)
    return Factor(lower.flip(0, 1), order)


def float_rounder(dtype: torch.dtype) -> RoundColumn:
    """A rounder to a float dtype."""
    return lambda w, column: w.to(dtype).float()


def round_weight(
    weight: Tensor,  # (out, in) float32
    factor: Factor,
    round_column: RoundColumn,
) -> Tensor:  # (out, in) float32, of values that round_column gave
    """Q, column after column: q = round(w), e = (w - q) / u_ii, and w_j ← w_j - e u_ij for the
    columns j that follow, with u = r⁻¹, so uᵀ u is the inverse of the damped C. float32."""
    width = weight.shape[1]
    eye = torch.eye(width, dtype=torch.float64, device=weight.device)
    u = torch.linalg.solve_triangular(factor.r, eye, upper=True).float()
    del eye
    columns = factor.order.tolist()
    w = weight.T[factor.order]  # (in, out): a column is a row of memory
    for first in range(0, width, BLOCK):
        last = min(first + BLOCK, width)
        errors = w.new_empty(last - first, w.shape[1])
        for i in range(first, last):
            value = round_column(w[i], columns[i])
            error = torch.sub(w[i], value, out=errors[i - first]).div_(u[i, i])
            w[i] = value
            w[i + 1 : last].addr_(u[i, i + 1 : last], error, alpha=-1)
        w[last:].addmm_(u[first:last, last:].T, errors, alpha=-1)
    result = torch.empty_like(weight, memory_format=torch.contiguous_format)
    result.T[factor.order] = w
    return result


def unrounded(
    weight: Tensor,  # (out, in) float64
    q: Tensor,  # (out, in) float64: what it was rounded to
    factor: Factor,
) -> Tensor:  # (out, in) float64
    """The value of each element when `round_weight` rounded it to q: q + e u_ii with e = (W - q) r,
    without the sums of float32."""
    errors = (weight - q)[:, factor.order] @ factor.r
    before = errors.div_(factor.r.diagonal())
    result = q.clone()
    result[:, factor.order] += before
    return result


def output_norm(
    m: Tensor,  # (out, in) float32
    c: Tensor,  # (in, in) float32
) -> float:
    """‖m C^½‖_F."""
    each = piece(m.device, ROWS * m.shape[1]) // max(1, m.shape[1])
    squares = [
        torch.dot((rows @ c).double().view(-1), rows.double().view(-1))
        for rows in m.contiguous().split(max(1, each))
    ]
    return math.sqrt(max(0.0, math.fsum(floats(squares))))

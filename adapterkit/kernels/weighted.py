"""Approximation errors weighted by a layer's inputs: the mean of ‖(W - L) x‖² is ‖(W - L) s‖_F²
with s sᵀ = C = E[x xᵀ]. The scale of C does not matter.

The best L of a rank is u uᵀ W, u the leading left singular vectors of W s:
(W - L) s = (1 - u uᵀ) W s. No inverse of s is needed.
"""

import math

import torch
from torch import Tensor

from adapterkit.kernels.lowrank import Svd

# of the mean of C's diagonal: added to it until it is positive definite
DAMPING = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
SYMMETRIC = 1e-3  # of the largest element
NOT_POSITIVE = "not positive semidefinite"


def normalized(
    c: Tensor,  # (n, n) float32
) -> Tensor:  # (n, n) float64
    """C / mean(diag C). Raises ValueError for what is no covariance: not symmetric, all zeros, or a
    negative mean."""
    largest = float(c.abs().amax())
    if not largest or not math.isfinite(largest):
        raise ValueError("zeros" if not largest else "values that are not finite")
    if float((c - c.T).abs().amax()) > SYMMETRIC * largest:
        raise ValueError("not symmetric")
    wide = c.double()
    mean = float(wide.diagonal().mean())
    if mean <= 0:
        raise ValueError(NOT_POSITIVE)
    return wide / mean


def root(
    c: Tensor,  # (n, n) float32
) -> tuple[Tensor, float]:  # (n, n) float32, lower triangular
    """s with s sᵀ = C / mean(diag C) + d·1, and d, the least of DAMPING with which Cholesky's
    decomposition succeeds: float64, n³/3 operations.

    Raises ValueError for what is no covariance: as `normalized`, or not positive semidefinite, as
    one may be that was rounded to 16 bits.
    """
    unit = normalized(c)
    for damping in DAMPING:
        damped = unit.clone()
        damped.diagonal().add_(damping)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            return factor.float(), damping
    raise ValueError(NOT_POSITIVE)


def project(
    u: Tensor,  # (out, k), orthonormal
    w: Tensor,  # (out, in)
) -> Svd:
    """The triplets of u uᵀ w."""
    x, s, vh = torch.linalg.svd(u.T @ w, full_matrices=False)
    return Svd(u @ x, s, vh)

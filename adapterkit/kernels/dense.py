"""Decompose small square matrices and thin matrices on the faster device for each.

A GPU needs a millisecond for what LAPACK does in a tenth of that, synchronizes for each, and its
libraries fail on matrices of zeros. So small matrices, zeros, and those on which a GPU fails go to
the host and back. On a GPU, a thin QR is two Cholesky decompositions.
"""

from collections.abc import Callable

import torch
from torch import Tensor

SMALL = 256  # the shorter side of a matrix that is decomposed on the host
THIN = 2.0  # rows for a column from which on a GPU's QR is Cholesky's
NEAR_ONE = 0.5  # ‖qᵀq - 1‖ after the first Cholesky QR, below which the second one gives rounding


def eigh(x: Tensor) -> tuple[Tensor, Tensor]:  # rising
    values, vectors = _decomposed(torch.linalg.eigh, x)
    return values, vectors


def eigvalsh(x: Tensor) -> Tensor:  # rising
    (values,) = _decomposed(lambda x: (torch.linalg.eigvalsh(x),), x)
    return values


def svd(
    x: Tensor,  # (n, m)
) -> tuple[Tensor, Tensor, Tensor]:  # (n, k), (k,), (k, m), k = min(n, m)
    long, short = max(x.shape), min(x.shape)
    if x.device.type != "cpu" and long >= THIN * short > 0:
        tall = x.shape[0] == long
        q, r = qr(x if tall else x.T)
        u, s, vh = svd(r)
        return (q @ u, s, vh) if tall else (vh.T, s, (q @ u).T)
    u, s, vh = _decomposed(lambda x: torch.linalg.svd(x, full_matrices=False), x)
    return u, s, vh


def svdvals(x: Tensor) -> Tensor:
    (values,) = _decomposed(lambda x: (torch.linalg.svdvals(x),), x)
    return values


def qr(
    x: Tensor,  # (n, k)
) -> tuple[Tensor, Tensor]:  # (n, k) orthonormal columns, (k, k) upper triangular; of min(n, k)
    """The QR decomposition; for thin matrices on a GPU by Cholesky in float64, by Householder if
    columns are dependent."""
    if x.device.type != "cpu" and x.shape[0] >= THIN * x.shape[1] > 0:
        wide = x.double()
        one = torch.eye(x.shape[1], dtype=wide.dtype, device=x.device)
        q, first = _cholesky_qr(wide)
        if bool((q.T @ q - one).norm() < NEAR_ONE):  # false for NaN
            q, second = _cholesky_qr(q)
            return q.to(x.dtype), (second @ first).to(x.dtype)
    q, r = torch.linalg.qr(x)
    return q, r


def _cholesky_qr(x: Tensor) -> tuple[Tensor, Tensor]:
    r, _ = torch.linalg.cholesky_ex(x.T @ x, upper=True)
    return torch.linalg.solve_triangular(r, x, upper=True, left=False), r


def _decomposed(function: Callable[[Tensor], tuple[Tensor, ...]], x: Tensor) -> list[Tensor]:
    if x.device.type != "cpu" and min(x.shape) > SMALL and bool(x.any()):
        try:
            return list(function(x))
        except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
            pass
    return [part.to(x.device) for part in function(x.cpu())]

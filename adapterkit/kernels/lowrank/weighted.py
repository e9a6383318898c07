"""Approximation errors weighted by a layer's inputs: the mean of ‖(W - L) x‖² is ‖(W - L) s‖_F²
with s sᵀ = C = E[x xᵀ]. The scale of C does not matter.

The best L of a rank is u uᵀ W, u the leading left singular vectors of W s:
(W - L) s = (1 - u uᵀ) W s. No inverse of s is needed. The first k rank-one parts u uᵀ W are the
best L of rank k, for every k.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from adapterkit.kernels import dense
from adapterkit.kernels.lowrank import algebra
from adapterkit.kernels.lowrank.algebra import Product, Svd
from adapterkit.kernels.lowrank.truncated import leading_svd, truncated_svd
from adapterkit.kernels.sums import squared_norm

# of the mean of C's diagonal: added to it until it is positive definite
DAMPING = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
SYMMETRIC = 1e-3  # of the largest element
NOT_POSITIVE = "not positive semidefinite"


def normalized(
    c: Tensor,  # (n, n)
) -> Tensor:  # (n, n) float64
    """C / mean(diag C). Raises ValueError for what is no covariance: not symmetric, all zeros, or a
    negative mean."""
    check(c)
    wide = c.double()
    mean = float(wide.diagonal().mean())
    if mean <= 0:
        raise ValueError(NOT_POSITIVE)
    return wide / mean


def root(
    c: Tensor,  # (n, n) float32
) -> tuple[Tensor, float]:  # (n, n) float32, lower triangular
    """`cholesky` of a covariance, rounded to float32."""
    factor, damping = cholesky(c)
    return factor.float(), damping


def cholesky(
    c: Tensor,  # (n, n)
) -> tuple[Tensor, float]:  # (n, n) float64, lower triangular
    """s with s sᵀ = C / mean(diag C) + d·1, and d, the least of DAMPING with which Cholesky's
    decomposition succeeds: n³/3 operations.

    Raises ValueError for what is no covariance: as `normalized`, or not positive semidefinite, as
    one may be that was rounded to 16 bits.
    """
    unit = normalized(c)
    for damping in DAMPING:
        damped = unit.clone()
        damped.diagonal().add_(damping)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            return factor, damping
    raise ValueError(NOT_POSITIVE)


def check(
    c: Tensor,  # (n, n)
) -> None:
    """Raises ValueError for what is not finite, all zeros, not symmetric, or has a negative
    diagonal."""
    largest = float(c.abs().amax())
    if not largest or not math.isfinite(largest):
        raise ValueError("zeros" if not largest else "values that are not finite")
    if float((c - c.T).abs().amax()) > SYMMETRIC * largest:
        raise ValueError("not symmetric")
    if float(c.diagonal().amin()) < 0:
        raise ValueError(NOT_POSITIVE)


def project(
    u: Tensor,  # (out, k), orthonormal
    w: Tensor,  # (out, in)
) -> Svd:
    """The triplets of u uᵀ w."""
    x, s, vh = dense.svd(u.T @ w)
    return Svd(u @ x, s, vh)


class Energies(NamedTuple):
    """‖X‖_F² of a matrix, and the shares of it that the rank-one parts of an approximation have:
    of the first k, ‖X - L‖_F² = total - Σ parts[:k]."""

    parts: Tensor  # (k,)
    total: float


class Comparison(NamedTuple):
    """Of approximations that are the best ones of Δ·root: the parts, and errors in both norms, also
    of the plain fit, which is the best one of Δ."""

    right: Tensor  # (k, in): uᵀ Δ
    error: Energies  # of Δ
    unweighted_error: Energies  # of Δ, by the plain fit
    unweighted_output_error: Energies  # of Δ·root, by the plain fit


class Decomposition(NamedTuple):
    """The leading singular triplets of Δ·root, and ‖Δ·root‖_F²; of Δ where there is no root."""

    svd: Svd
    total: float
    comparison: Comparison | None = None  # where there is a root

    @property
    def energies(self) -> dict[str, Energies]:
        """By the error's name; first those of the norm in which the fit is the best."""
        own = Energies(self.svd.s.double().square(), self.total)
        if self.comparison is None:
            return {"error": own}
        _, error, unweighted_error, unweighted_output_error = self.comparison
        return {
            "output_error": own,
            "error": error,
            "unweighted_error": unweighted_error,
            "unweighted_output_error": unweighted_output_error,
        }

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """a (rank, in) and b (out, rank) of the best approximation of that rank, the norms of each
        rank-one part equal; zeros beyond the triplets that there are."""
        if self.comparison is None:
            return algebra.refit(self.svd, rank)
        left, right = self.svd.u[:, :rank], self.comparison.right[:rank]
        a, b = algebra.balance(Product(left, right))
        more = rank - len(a)
        return pad(a, (0, 0, 0, more)), pad(b, (0, more))


def decompose_product(
    product: Product,  # Δ (out, in)
    root: Tensor | None = None,  # (in, in)
) -> Decomposition:
    """All triplets of Δ·root from the factors of Δ, which is never multiplied out, in float64."""
    plain = algebra.svd(product)
    total = float(plain.s.square().sum())
    if root is None:
        return Decomposition(plain, total)
    outputs = Product(product.left, product.right @ root.to(product.right.dtype))
    svd = algebra.svd(outputs)
    right, by_plain = (_from_left(svd.u, product), _from_left(plain.u, outputs))
    squares = float(svd.s.square().sum())
    return Decomposition(svd, squares, _compare(right, total, plain.s, by_plain, squares))


def decompose_dense(
    delta: Tensor,  # (out, in) float32
    max_rank: int,
    energy: float | None = None,
    ratio: float | None = None,
    start: Svd | None = None,
    root: Tensor | None = None,  # (in, in) float32
) -> Decomposition:
    """The leading triplets of Δ·root, as many as `truncated.leading_svd` says. With a root Δ's own
    are computed too, for the comparison."""
    if root is None:
        return Decomposition(*leading_svd(delta, max_rank, energy, ratio, start))
    outputs = delta @ root
    svd, squares = leading_svd(outputs, max_rank, energy, ratio)
    plain = truncated_svd(delta, len(svd.s), start=start)
    right, by_plain = svd.u.T @ delta, plain.u.T @ outputs
    compared = _compare(right, squared_norm(delta), plain.s, by_plain, squares)
    return Decomposition(svd, squares, compared)


def _from_left(u: Tensor, product: Product) -> Tensor:
    return (u.T @ product.left) @ product.right


def _compare(
    right: Tensor, total: float, s: Tensor, by_plain: Tensor, squares: float
) -> Comparison:
    """`total` and `s`: ‖Δ‖_F² and the singular values of Δ; `by_plain`: its left vectors' Δ·root;
    `squares`: ‖Δ·root‖_F²."""
    return Comparison(
        right,
        Energies(_row_squares(right), total),
        Energies(s.double().square(), total),
        Energies(_row_squares(by_plain), squares),
    )


def _row_squares(rows: Tensor) -> Tensor:
    return rows.double().square().sum(1)

"""Approximation errors weighted by a layer's inputs: the mean of ‖(W - L) x‖² is ‖(W - L) s‖_F²
with s sᵀ = C = E[x xᵀ]. The scale of C does not matter.

The best L of a rank is u uᵀ W, u the leading left singular vectors of W s:
(W - L) s = (1 - u uᵀ) W s. No inverse of s is needed. The first k rank-one parts u uᵀ W are the
best L of rank k, for every k.
"""

import math
from collections.abc import Mapping
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
    """C / mean(diag C). Raises ValueError if C is not symmetric, all zeros, or has a negative
    mean."""
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

    Raises ValueError as `normalized`, and if C is not positive semidefinite, for example after
    rounding to 16 bits.
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
    """Raises ValueError for values that are not finite, all zeros, an asymmetric matrix, or a
    negative diagonal."""
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
    """‖X‖_F² of a matrix, and the shares of the rank-one terms of an approximation: for the first
    k, ‖X - L‖_F² = total - Σ parts[:k]."""

    parts: Tensor  # (k,)
    total: float


class Decomposition(NamedTuple):
    """The leading singular triplets of Δ·root, and ‖Δ·root‖_F²; without a root, of Δ."""

    svd: Svd
    total: float
    right: Tensor | None = None  # (k, in): uᵀ Δ, where there is a root
    compared: Mapping[str, Energies] | None = None  # other errors then, by name

    @property
    def energies(self) -> Mapping[str, Energies]:
        """Energies by the error's name; the norm in which the fit is best comes first."""
        own = Energies(self.svd.s.double().square(), self.total)
        return {"error": own} if self.compared is None else {"output_error": own, **self.compared}

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """Factors a (rank, in) and b (out, rank) of the best approximation of that rank, with equal
        norms in each rank-one term; zeros beyond the available triplets."""
        if self.right is None:
            return algebra.refit(self.svd, rank)
        a, b = algebra.balance(Product(self.svd.u[:, :rank], self.right[:rank]))
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
    right = (svd.u.T @ product.left) @ product.right
    by_plain = (plain.u.T @ outputs.left) @ outputs.right
    squares = float(svd.s.square().sum())
    return Decomposition(svd, squares, right, _compared(right, total, plain.s, by_plain, squares))


def decompose_dense(
    delta: Tensor,  # (out, in) float32
    max_rank: int,
    energy: float | None = None,
    ratio: float | None = None,
    start: Svd | None = None,
    root: Tensor | None = None,  # (in, in) float32
) -> Decomposition:
    """The leading triplets of Δ·root, as many as `truncated.leading_svd` finds. With a root, Δ's
    own are computed too, for the comparison."""
    if root is None:
        return Decomposition(*leading_svd(delta, max_rank, energy, ratio, start))
    outputs = delta @ root
    svd, squares = leading_svd(outputs, max_rank, energy, ratio)
    plain = truncated_svd(delta, len(svd.s), start=start)
    right, by_plain = svd.u.T @ delta, plain.u.T @ outputs
    compared = _compared(right, squared_norm(delta), plain.s, by_plain, squares)
    return Decomposition(svd, squares, right, compared)


def _compared(
    right: Tensor, total: float, s: Tensor, by_plain: Tensor, squares: float
) -> dict[str, Energies]:
    """Errors of Δ, and in both norms those of the plain fit, the best fit of Δ. `total` and `s`:
    ‖Δ‖_F² and the singular values of Δ; `by_plain`: its left vectors' Δ·root; `squares`:
    ‖Δ·root‖_F²."""
    row_squares = lambda rows: rows.double().square().sum(1)
    return {
        "error": Energies(row_squares(right), total),
        "unweighted_error": Energies(s.double().square(), total),
        "unweighted_output_error": Energies(row_squares(by_plain), squares),
    }

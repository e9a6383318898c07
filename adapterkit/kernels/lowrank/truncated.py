"""The leading singular triplets of a dense matrix: block Krylov, or a full decomposition if that
is as cheap. Trailing triplets, those of the inverse, and principal components use them.

Block Golub-Kahan iteration with full reorthogonalization and Rayleigh-Ritz extraction (Musco and
Musco, arXiv:1504.05477). Vectors are rows: u (K, n) and v (K', m) orthonormal, u @ w = core @ v,
and the Ritz values are the singular values of the core.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from adapterkit.kernels import dense
from adapterkit.kernels.block_sizes import piece
from adapterkit.kernels.lowrank import krylov
from adapterkit.kernels.lowrank.algebra import ROUNDING, Svd, rank_for_energy
from adapterkit.kernels.lowrank.krylov import FLOOR, OVERSAMPLING, Matrix, expand
from adapterkit.kernels.sums import squared_norm

CHUNK = 1 << 20  # elements converted to float64 at a time on a CPU
# allowed excess over the best squared error: 2e-5 is 1 + 1e-5 of the norm
EXCESS = 1e-5
# an eigh of size K takes as long as 25 K³ operations of a float32 product (20 to 36, K 192 to 2048)
EIGH = 25
NOISE_SHARE = 0.1  # random directions after `start` in a first block
# up to this shorter side, full decompositions take 8 to 20 ms, as long as the iteration
SMALL_SIDE = 256
# trailing triplets: of the largest value of the inverse that is asked for, the smallest one;
# beyond, float64 does not resolve it next to the largest
SPREAD = 1e-6
# of 1 / condition: below, the inverse has hardly a correct digit
SINGULAR = 1e-13
FULL = 0.125  # share of the components from which on a full decomposition takes less time


class _Ritz(NamedTuple):
    """Rayleigh-Ritz approximations from the core."""

    squares: Tensor  # (K,), descending: squared singular values
    vectors: Tensor  # (K, K): the core's left vectors in columns
    residuals: Tensor  # (K,), squared


def truncated_svd(
    w: Tensor,  # (n, m), float32 or float64
    rank: int,
    *,
    tolerance: float = 1e-6,  # of the triplets, relative to s₁
    start: Svd | None = None,  # vectors whose span may be near the triplets: a shorter search
) -> Svd:
    """The leading min(rank, n, m) triplets of w, in w's dtype.

    Raises ValueError for a rank below 1, and for matrices as `krylov.wide` does.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, not {rank}")
    matrix, transposed = krylov.wide(w)
    k = min(rank, *w.shape)
    if tolerance < 1e-7:  # finer than a Gram matrix resolves
        return _restore(matrix, _exact(matrix, k), transposed)
    rows = None if start is None else krylov.long_side(start, transposed)
    left = _krylov(matrix, lambda squares: k, k + OVERSAMPLING, tolerance=tolerance, start=rows)
    left = _full(matrix, lambda squares: k) if left is None else left
    return _restore(matrix, triplets(matrix, left, k), transposed)


def svd_for_energy(w: Tensor, energy: float, max_rank: int) -> tuple[Svd, float]:
    """The fewest leading triplets, at most `max_rank`, with Σ s² >= energy · ‖w‖_F², in w's dtype;
    and ‖w‖_F² (float64).

    Raises ValueError for an energy outside (0, 1], a rank below 1, and matrices as `krylov.wide`.
    """
    if not 0 < energy <= 1 or max_rank < 1:
        raise ValueError(
            f"energy must be in (0, 1] and the largest rank at least 1, not {energy} and {max_rank}"
        )
    matrix, transposed = krylov.wide(w)
    max_rank = min(max_rank, *w.shape)
    squares_of_w = squared_norm(w)
    total = matrix.squares(squares_of_w)
    fewest = lambda squares: min(rank_for_energy(squares.sqrt(), energy, total), max_rank)
    svd = None
    if 1 - energy >= 1e-6:  # closer to 1, float32 products do not resolve what is missing
        far = min(w.shape) // 4  # a rank that blocks seldom reach within the budget
        hopeless = lambda squares: max_rank > far and _reach(squares, far) < energy * total
        block = min(max_rank, 32) + OVERSAMPLING
        left = _krylov(matrix, fewest, block, share=0.5, hopeless=hopeless)
        svd = None if left is None else triplets(matrix, left, max(len(left), 1))
    if svd is None or (
        len(svd.s) < max_rank and float(svd.s.square().sum()) < energy * total * (1 - ROUNDING)
    ):
        left = _full(matrix, fewest)
        svd = triplets(matrix, left, len(left))
    return _restore(matrix, svd, transposed), squares_of_w


def svd_for_ratio(w: Tensor, ratio: float, max_rank: int) -> tuple[Svd, float]:
    """The leading triplets with s >= s₁ / ratio, at least one and at most `max_rank`, in w's dtype;
    and ‖w‖_F² (float64).

    Raises ValueError for a ratio or a rank below 1, and for matrices as `krylov.wide` does.
    """
    if not ratio >= 1 or max_rank < 1:
        raise ValueError(
            f"ratio and the largest rank must be at least 1, not {ratio} and {max_rank}"
        )
    matrix, transposed = krylov.wide(w)
    max_rank = min(max_rank, *w.shape)

    def least(squares: Tensor) -> float:
        return float(squares[:1].sum()) / ratio / ratio

    def count(squares: Tensor) -> int:
        large = (squares >= least(squares)) & (squares > 0)
        return max(1, min(int(large.sum()), max_rank))

    squares_of_w = squared_norm(w)
    total = matrix.squares(squares_of_w)
    left = None
    if ratio * FLOOR[w.dtype] < 1:  # above, float32 products do not resolve values that small
        block = min(max_rank, 32) + OVERSAMPLING
        left = _krylov(matrix, count, block, share=0.5, least=least, total=total)
    left = _full(matrix, count) if left is None else left
    svd = triplets(matrix, left, max(len(left), 1))
    return _restore(matrix, svd, transposed), squares_of_w


def leading_svd(
    w: Tensor,
    max_rank: int,
    energy: float | None,
    ratio: float | None = None,
    start: Svd | None = None,  # as in `truncated_svd`
) -> tuple[Svd, float]:
    """The leading triplets of w, and ‖w‖_F² (float64): `max_rank` of them, or at most that many:
    those with the share `energy` of it, or those down to s₁ / `ratio`."""
    if energy is not None:
        return svd_for_energy(w, energy, max_rank)
    if ratio is not None:
        return svd_for_ratio(w, ratio, max_rank)
    return truncated_svd(w, max_rank, start=start), squared_norm(w)


def _restore(matrix: Matrix, svd: Svd, transposed: bool) -> Svd:
    u, s, vh = krylov.restore(matrix, svd, transposed)
    return Svd(u.contiguous(), s, vh.contiguous())


def _krylov(
    matrix: Matrix,
    count: Callable[[Tensor], int],
    block: int,
    *,
    tolerance: float = 1e-6,
    share: float = 1.0,
    hopeless: Callable[[Tensor], bool] = lambda squares: False,
    least: Callable[[Tensor], float] = lambda squares: math.inf,
    total: float = 0.0,
    start: Tensor | None = None,
) -> Tensor | None:
    """The first k = `count`(squared values) left vectors (k, n) float64, fewer if w's rank is
    lower; None if `share` of the cost of a full decomposition is not enough.

    All squared values from the k-th on are below `least`, which the rest of `total`, ‖w‖_F²,
    proves. A block is wider than k, because it would otherwise miss some of (nearly) equal values.
    """
    n, m = matrix.w.shape
    device, dtype = matrix.w.device, matrix.w.dtype
    budget = share * _full_cost(n, m)
    if n <= SMALL_SIDE or _cost(n, m, 3 * block, 3 * block) + EIGH * (3 * block) ** 3 > budget:
        return None
    numbers = krylov.generator(matrix)
    u, v = (torch.zeros(0, size, dtype=dtype, device=device) for size in (n, m))
    core = torch.zeros(0, 0, dtype=torch.float64, device=device)
    first = krylov.gaussian(matrix, block, m, numbers)
    if start is not None:  # some noise, for directions outside its span
        mixed = krylov.gaussian(matrix, block, len(start), numbers) @ start.to(dtype)
        first = first.mul_(NOISE_SHARE * float(mixed.norm()) / float(first.norm())).add_(mixed)
    rows, top, spent, checked = expand(v, first, 0.0).rows, 0.0, 0.0, 0.0
    while True:
        v = torch.cat([v, rows])
        new = expand(u, matrix.columns(rows), top)
        top = max(top, new.size)
        u = torch.cat([u, new.rows])
        ahead = expand(v, matrix.rows(new.rows), top)
        core = pad(core, (0, len(v) + len(ahead.rows) - core.shape[1]))
        core = torch.cat([core, torch.cat([ahead.inside, ahead.beyond], 1)])
        spent += _cost(n, m, len(new.rows), len(u))
        rows, done = ahead.rows, not len(new.rows) or not len(ahead.rows)
        if done or (len(u) >= 2 * block and spent - checked >= EIGH * len(u) ** 3):
            ritz = _ritz(core, ahead.beyond)
            spent = checked = spent + EIGH * len(u) ** 3
            k = count(ritz.squares)
            excess, limit = math.inf, least(ritz.squares)
            if k < len(u):
                excess = _excess(ritz, k, new.size, tolerance)
                excess = max(excess, _above(ritz, k, new.size, limit))
            if done and total - float(ritz.squares.sum()) > limit:
                return None  # more equal values than a block has vectors
            if done or (excess <= 1 and (limit == math.inf or block >= k + OVERSAMPLING)):
                return (u.double().T @ ritz.vectors[:, :k]).T
            # After a plateau the error falls about evenly on a log scale: from above this line it
            # does not come down in time.
            late = k < len(u) and len(u) >= 3 * block and excess > 10 ** (10 * (1 - spent / budget))
            if late or hopeless(ritz.squares):
                return None
            if block < k + OVERSAMPLING and k <= len(u):
                more = krylov.gaussian(matrix, k + OVERSAMPLING - block, m, numbers)
                rows = torch.cat([rows, expand(torch.cat([v, rows]), more, 0.0).rows])
                block = k + OVERSAMPLING
        if len(u) + block > n or spent + _cost(n, m, block, len(u) + block) > budget:
            return None


def _full_cost(n: int, m: int) -> float:
    """The time of `_full` in operations of a large float32 product, as EIGH."""
    return 2.0 * n * n * m + EIGH * n**3


def _cost(n: int, m: int, block: int, size: int) -> float:
    """The time of a step with `size` vectors per side, in the same unit: two products with w, two
    orthogonalizations per side, four thin QRs, calls. Skinny products run at half the speed of
    large ones (measured)."""
    return 8.0 * n * m * block + (n + m) * (16.0 * size + 60.0 * block) * block + 3e7


def _ritz(core: Tensor, beyond: Tensor) -> _Ritz:
    """The singular values of u @ w = core @ v, and the residuals ‖beyondᵀ x_last‖: the distance of
    wᵀ u from v's span, where x_last are the vectors' components in the last block."""
    squares, vectors = dense.eigh(core @ core.T)
    squares, vectors = squares.flip(0).clamp_(min=0), vectors.flip(1)
    return _Ritz(squares, vectors, (beyond.T @ vectors[len(core) - len(beyond) :]).square().sum(0))


def _excess(ritz: _Ritz, k: int, push: float, tolerance: float) -> float:
    """The errors of the first k values relative to the allowed ones: at most 1 if all ‖wᵀ u - s v‖
    are below tolerance · s₁, or if the values' error, which is of second order, is small.

    For each p >= i, with push the norm of the last block's step, σᵢ² - θᵢ² <= push² Σ_{j<=p} rⱼ² /
    (θ_p² - θ_{p+1}²).
    """
    squares, residuals = ritz.squares, ritz.residuals
    scale = tolerance * squares[0].sqrt()
    lack = _lack(ritz, push)[:k]
    values = (lack / (scale * torch.maximum(2 * squares[:k].sqrt(), scale))).max()
    error = lack.sum() / (EXCESS * squares[k:].sum() + 1e-300)
    return float(torch.minimum(torch.maximum(values, error), residuals[:k].max() / scale.square()))


def _above(ritz: _Ritz, k: int, push: float, least: float) -> float:
    """The possible error of value k, the first after the wanted ones, relative to its distance from
    `least`: from its residual, or from `_lack`, which is weak if the next values are flat."""
    margin, lack = least - float(ritz.squares[k]), _lack(ritz, push)[k:]
    if not 0 < margin < math.inf:  # no limit, or more than k values within it
        return 0.0
    return min(push * float(ritz.residuals[k].sqrt()), *lack[:1].tolist(), math.inf) / margin


def _lack(ritz: _Ritz, push: float) -> Tensor:
    """An upper bound of the missing growth of each squared value except the last."""
    gaps = (ritz.squares[:-1] - ritz.squares[1:]).clamp(min=1e-300)
    lack = push**2 * ritz.residuals.cumsum(0)[:-1] / gaps
    return lack.flip(0).cummin(0).values.flip(0)


def _reach(squares: Tensor, rank: int) -> float:
    """An upper bound of Σ s² over the first `rank` values, from the first half of the Ritz values,
    which have nearly converged."""
    p = len(squares) // 2
    return float(squares[:p].sum() + squares[p] * max(rank - p, 0))


def _full(matrix: Matrix, count: Callable[[Tensor], int]) -> Tensor:
    """The first k = `count`(squared values) left vectors (k, n) float64: eigenvectors of w wᵀ
    (n, n), w's short side, in float64.

    Its rounding, 1e-16 s₁², blurs only vectors of values below 1e-8 s₁, less than float32 resolves,
    and `triplets` computes the values from w itself. At 2048 x 5632 on one thread this takes 2.5 s,
    LAPACK's float32 svd 9.5 s.
    """
    n = matrix.w.shape[0]
    gram = torch.zeros(n, n, dtype=torch.float64, device=matrix.w.device)
    for columns in matrix.w.split(max(piece(matrix.w.device, CHUNK) // n, 1), 1):
        part = columns.double() * matrix.half * matrix.half
        for i in range(0, n, 256):  # eigh reads the lower triangle
            gram[i : i + 256, : i + 256].addmm_(part[i : i + 256], part[: i + 256].T)
    squares, vectors = dense.eigh(gram)
    return vectors.flip(1)[:, : count(squares.flip(0).clamp_(min=0))].T


def _exact(matrix: Matrix, k: int) -> Svd:
    """The first k triplets from LAPACK's decomposition of w in float64."""
    w = matrix.w.double() * matrix.half * matrix.half
    return Svd(*dense.svd(w)).top(k)


def triplets(matrix: Matrix, left: Tensor, k: int) -> Svd:
    """The k triplets of leftᵀ left w, float64. Householder's QR returns orthonormal vectors even if
    some are missing or zero."""
    left, _ = dense.qr(pad(left, (0, 0, 0, k - len(left))).T)
    q, r = dense.qr(matrix.rows(left.T.to(matrix.w.dtype)).T.double())
    x, s, yh = dense.svd(r.T)
    return Svd(left @ x, s, yh @ q.T)


# Found by the leading ones.


def trailing_svd(
    w: Tensor,  # (n, m)
    rank: int,
) -> Svd:
    """The triplets of the min(rank, n, m) smallest singular values of w, falling, in float64.

    w or wᵀ = q l with l square: the smallest values of l are the reciprocals of l⁻¹'s largest,
    which `truncated_svd` finds; if l is singular to float64's rounding, LAPACK decomposes it.
    Raises ValueError for a rank below 1.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, not {rank}")
    tall = w.shape[0] >= w.shape[1]
    matrix = w.double()
    q, triangle = dense.qr(matrix if tall else matrix.T)
    k = min(rank, len(triangle))
    found = _inverted(triangle, k)
    if found is None:
        u, s, vh = dense.svd(triangle)
        found = Svd(u[:, -k:], s[-k:], vh[-k:])
    u, s, vh = found
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
    # once more, because residues of large values in v matter for the small ones
    v, s, xh = dense.svd(inverse @ svd.vh.T)
    return Svd((svd.vh.T @ xh.T).flip(1), 1 / s.flip(0), v.T.flip(0))


def principal_components(
    covariance: Tensor,  # (in, in) E[x xᵀ], float64
    mean: Tensor,  # (in,) E[x], float64
    count: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return components (k, in), variances (k,) and variance (1,) in float32: the leading k =
    min(count, in) eigenvectors of C - m mᵀ as rows, their eigenvalues in falling order, and the
    trace.

    For few components block Krylov iteration finds them to 1e-7 of the largest variance. The sign
    makes the largest element of each row positive. Computed in float64.
    """
    centered = torch.addr(covariance.double(), mean.double(), mean.double(), alpha=-1)
    width = len(centered)
    k = min(count, width)
    if k < FULL * width and bool(centered.any()):
        svd = truncated_svd(centered, k, tolerance=1e-7)
        variances, components = svd.s, svd.vh
    else:
        values, vectors = dense.eigh(centered)
        variances, components = values.flip(0)[:k], vectors.T.flip(0)[:k]
    largest = components.gather(1, components.abs().argmax(1, keepdim=True))
    components = components * torch.where(largest < 0, -1.0, 1.0)
    variance = centered.trace().clamp(min=0)[None]
    return components.float(), variances.clamp(min=0).float(), variance.float()

"""The leading singular triplets of a dense matrix: block Krylov, or a full decomposition where that is no dearer.

Block Golub-Kahan iteration with full re-orthogonalisation and Rayleigh-Ritz extraction (Musco and Musco, arXiv:1504.05477).
Vectors are rows: u (K, n) and v (K', m) orthonormal, u @ w = core @ v, and the Ritz values are the singular values of the core.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from adapterkit.kernels.lowrank import ROUNDING, Svd, rank_for_energy
from adapterkit.kernels.sums import squared_norm

EXTRA = 8  # vectors of a block beyond the wanted ones: the gap that decides the speed is the one behind them
CHUNK = 1 << 20  # elements converted to float64 at a time
EXCESS = 1e-5  # of the squared error of the best approximation: what the Krylov one may add; 2e-5 is a factor 1 + 1e-5 of the norm
EIGH = 25  # an eigh of size K takes as long as 25 K³ operations of a float32 product (20 to 36, K from 192 to 2048)
BESIDE = 0.1  # of a first block: what is random where the rest is from a span that is given
SMALL = 256  # shorter sides up to this are decomposed in full at once: 8 to 20 ms, no more than the iteration takes
FLOOR = {
    torch.float32: 2.0**-22,
    torch.float64: 1e-9,
}  # what is below this much of s₁ in a block is rounding, not direction


class _Matrix(NamedTuple):
    """half² * w, its largest element near 1, w (n, m), n <= m. A product takes half before and half after, so that 1e30 fits."""

    w: Tensor
    half: float

    def rows(self, x: Tensor) -> Tensor:
        """x (k, n) -> x @ w (k, m)."""
        return (x * self.half @ self.w).mul_(self.half)

    def columns(self, y: Tensor) -> Tensor:
        """y (k, m) -> y @ wᵀ (k, n)."""
        return (y * self.half @ self.w.T).mul_(self.half)


class _Expansion(NamedTuple):
    """panel (b, m) = inside @ basis + beyond @ rows."""

    rows: Tensor  # (r, m) r <= b, orthonormal
    inside: Tensor  # (b, K) float64
    beyond: Tensor  # (b, r) float64
    size: float  # ‖beyond‖₂


class _Ritz(NamedTuple):
    """What the basis knows: squared values (K,), falling, the core's left vectors (K, K) in columns, squared residuals (K,)."""

    squares: Tensor
    vectors: Tensor
    residuals: Tensor


def truncated_svd(w: Tensor, rank: int, *, tolerance: float = 1e-6, near: Svd | None = None) -> Svd:
    """The leading min(rank, n, m) triplets of w (n, m), float32 or float64, all in w's dtype; `tolerance` is relative to s₁.

    `near`: vectors near whose span, on both sides, the triplets are thought to lie; a search that begins there is shorter.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, not {rank}")
    matrix, turned = _matrix(w)
    k = min(rank, *w.shape)
    if tolerance < 1e-7:  # finer than a Gram matrix resolves
        return _restore(matrix, _exact(matrix, k), turned)
    rows = None if near is None else near.u.T if turned else near.vh
    left = _krylov(matrix, lambda squares: k, k + EXTRA, tolerance=tolerance, near=rows)
    left = _full(matrix, lambda squares: k) if left is None else left
    return _restore(matrix, _finish(matrix, left, k), turned)


def svd_for_energy(w: Tensor, energy: float, most: int) -> tuple[Svd, float]:
    """The fewest leading triplets, at most `most`, with Σ s² >= energy * ‖w‖_F², in w's dtype; and ‖w‖_F² (float64)."""
    if not 0 < energy <= 1 or most < 1:
        raise ValueError(
            f"energy must be in (0, 1] and the largest rank at least 1, not {energy} and {most}"
        )
    matrix, turned = _matrix(w)
    most = min(most, *w.shape)
    total = _squared_norm(w, matrix.half)
    fewest = lambda squares: min(rank_for_energy(squares.sqrt(), energy, total), most)
    found = None
    if 1 - energy >= 1e-6:  # closer to 1, float32 products do not tell what is missing
        far = min(w.shape) // 4  # a rank that blocks seldom reach within the budget
        hopeless = lambda squares: most > far and _reach(squares, far) < energy * total
        left = _krylov(matrix, fewest, min(most, 32) + EXTRA, share=0.5, hopeless=hopeless)
        found = None if left is None else _finish(matrix, left, max(len(left), 1))
    if found is None or (
        len(found.s) < most and float(found.s.square().sum()) < energy * total * (1 - ROUNDING)
    ):
        left = _full(matrix, fewest)
        found = _finish(matrix, left, len(left))
    return _restore(
        matrix, found, turned
    ), total / matrix.half / matrix.half / matrix.half / matrix.half


def svd_for_ratio(w: Tensor, ratio: float, most: int) -> tuple[Svd, float]:
    """The leading triplets with s >= s₁ / ratio, at least one and at most `most`, in w's dtype; and ‖w‖_F² (float64)."""
    if not ratio >= 1 or most < 1:
        raise ValueError(f"ratio and the largest rank must be at least 1, not {ratio} and {most}")
    matrix, turned = _matrix(w)
    most = min(most, *w.shape)
    least = lambda squares: float(squares[:1].sum()) / ratio / ratio
    wanted = lambda squares: max(
        1, min(int(((squares >= least(squares)) & (squares > 0)).sum()), most)
    )
    total = _squared_norm(w, matrix.half)
    left = None
    if (
        ratio * FLOOR[w.dtype] < 1
    ):  # above, float32 products do not tell which values are that small
        left = _krylov(matrix, wanted, min(most, 32) + EXTRA, share=0.5, least=least, total=total)
    left = _full(matrix, wanted) if left is None else left
    found = _finish(matrix, left, max(len(left), 1))
    return _restore(
        matrix, found, turned
    ), total / matrix.half / matrix.half / matrix.half / matrix.half


def _matrix(w: Tensor) -> tuple[_Matrix, bool]:
    """w or wᵀ, whichever is wide, as a view that a product can read, with its scale; whether it is wᵀ."""
    if w.dtype not in FLOOR or w.ndim != 2 or not w.numel():
        raise ValueError(
            f"expected a float32 or float64 matrix, not {w.dtype} of shape {tuple(w.shape)}"
        )
    low, high = (float(x) for x in torch.aminmax(w))
    largest = max(-low, high)
    if not math.isfinite(low + high):
        raise ValueError("the matrix holds values that are not finite")
    w = w if 1 in w.stride() else w.contiguous()
    turned = w.shape[0] > w.shape[1]
    return _Matrix(w.T if turned else w, 2.0 ** -(math.frexp(largest)[1] // 2)), turned


def _restore(matrix: _Matrix, found: Svd, turned: bool) -> Svd:
    """Back to w's own scale, orientation and dtype."""
    u, s, vh = found
    u, vh = (vh.T, u.T) if turned else (u, vh)
    dtype = matrix.w.dtype
    return Svd(
        u.to(dtype).contiguous(),
        (s / matrix.half / matrix.half).to(dtype),
        vh.to(dtype).contiguous(),
    )


def _krylov(
    matrix: _Matrix,
    wanted: Callable[[Tensor], int],
    block: int,
    *,
    tolerance: float = 1e-6,
    share: float = 1.0,
    hopeless: Callable[[Tensor], bool] = lambda squares: False,
    least: Callable[[Tensor], float] = lambda squares: math.inf,
    total: float = 0.0,
    near: Tensor | None = None,
) -> Tensor | None:
    """The wanted leading left vectors (k, n) float64, fewer if w's rank is; None where `share` of the full cost will not do.

    All squared values but the wanted ones are below `least`; of ‖w‖_F², `total`, nothing that large is left. A block is wider than
    the number wanted, or it would miss some of the values that are equal or nearly so.
    """
    n, m = matrix.w.shape
    device, dtype = matrix.w.device, matrix.w.dtype
    budget = share * _full_cost(n, m)
    if n <= SMALL or _cost(n, m, 3 * block, 3 * block) + EIGH * (3 * block) ** 3 > budget:
        return None
    generator = torch.Generator().manual_seed(n * 1_000_003 + m)
    draw = lambda count: torch.randn(count, m, generator=generator, dtype=dtype).to(device)
    u, v = (torch.zeros(0, size, dtype=dtype, device=device) for size in (n, m))
    core = torch.zeros(0, 0, dtype=torch.float64, device=device)
    first = draw(block)
    if near is not None:  # what lies beside the span is not left out
        mixed = torch.randn(block, len(near), generator=generator, dtype=dtype).to(
            device
        ) @ near.to(dtype)
        first = first.mul_(BESIDE * float(mixed.norm()) / float(first.norm())).add_(mixed)
    fresh, top, spent, checked = _expand(v, first, 0.0).rows, 0.0, 0.0, 0.0
    while True:
        v = torch.cat([v, fresh])
        new = _expand(u, matrix.columns(fresh), top)
        top = max(top, new.size)
        u = torch.cat([u, new.rows])
        ahead = _expand(v, matrix.rows(new.rows), top)
        core = torch.cat(
            [
                pad(core, (0, len(v) + len(ahead.rows) - core.shape[1])),
                torch.cat([ahead.inside, ahead.beyond], 1),
            ]
        )
        spent += _cost(n, m, len(new.rows), len(u))
        fresh, done = ahead.rows, not len(new.rows) or not len(ahead.rows)
        if done or (len(u) >= 2 * block and spent - checked >= EIGH * len(u) ** 3):
            ritz = _ritz(core, ahead.beyond)
            spent = checked = spent + EIGH * len(u) ** 3
            k = wanted(ritz.squares)
            excess, limit = math.inf, least(ritz.squares)
            if k < len(u):
                excess = max(
                    _excess(ritz, k, new.size, tolerance), _above(ritz, k, new.size, limit)
                )
            if (
                done and total - float(ritz.squares.sum()) > limit
            ):  # more equal values than a block has vectors
                return None
            if done or (excess <= 1 and (limit == math.inf or block >= k + EXTRA)):
                return (u.double().T @ ritz.vectors[:, :k]).T
            # After a plateau the error falls about evenly on a log scale: from above this line it does not come down in time.
            late = k < len(u) and len(u) >= 3 * block and excess > 10 ** (10 * (1 - spent / budget))
            if late or hopeless(ritz.squares):
                return None
            if block < k + EXTRA and k <= len(u):
                fresh = torch.cat(
                    [fresh, _expand(torch.cat([v, fresh]), draw(k + EXTRA - block), 0.0).rows]
                )
                block = k + EXTRA
        if len(u) + block > n or spent + _cost(n, m, block, len(u) + block) > budget:
            return None


def _full_cost(n: int, m: int) -> float:
    """Time of _full, in operations of a large float32 product, as EIGH."""
    return 2.0 * n * n * m + EIGH * n**3


def _cost(n: int, m: int, block: int, size: int) -> float:
    """Time of a step from `size` vectors a side: two products with w, two orthogonalisations a side, four thin QRs, calls.

    In the same unit: by measurement skinny products run at half the speed of large ones.
    """
    return 8.0 * n * m * block + (n + m) * (16.0 * size + 60.0 * block) * block + 3e7


def _expand(basis: Tensor, panel: Tensor, top: float) -> _Expansion:
    """panel (b, m) = inside @ basis (K, m) + beyond @ rows, the rows orthonormal, also to the basis; without what is rounding."""
    inside = panel @ basis.T
    rows, beyond = _frame(torch.addmm(panel, inside, basis, alpha=-1), FLOOR[panel.dtype], top)
    size = float(torch.linalg.matrix_norm(beyond, 2)) if beyond.numel() else 0.0
    rows, turn = _frame(
        torch.addmm(rows, rows @ basis.T, basis, alpha=-1), 0.1, 1.0
    )  # below 0.1: rounding, in the basis's span
    return _Expansion(rows, inside.double(), beyond @ turn, size)


def _frame(panel: Tensor, noise: float, top: float) -> tuple[Tensor, Tensor]:
    """rows (r, m) orthonormal, t (b, r) float64, panel = t @ rows but for directions below noise * max(top, the largest)."""
    q, r = torch.linalg.qr(panel.T.double())
    x, s, yh = torch.linalg.svd(r.T, full_matrices=False)
    keep = int((s > noise * max(top, float(s[0]) if len(s) else 0.0)).sum())
    return (yh[:keep] @ q.T).to(panel.dtype), x[:, :keep] * s[:keep]


def _ritz(core: Tensor, beyond: Tensor) -> _Ritz:
    """The singular values of u @ w = core @ v, and how far wᵀ u leaves v's span but for the last block, ‖beyondᵀ x_last‖."""
    squares, vectors = torch.linalg.eigh(core @ core.T)
    squares, vectors = squares.flip(0).clamp_(min=0), vectors.flip(1)
    return _Ritz(squares, vectors, (beyond.T @ vectors[len(core) - len(beyond) :]).square().sum(0))


def _excess(ritz: _Ritz, k: int, push: float, tolerance: float) -> float:
    """How many times too large the errors of the first k values are: at most 1 where all ‖wᵀ u - s v‖ are below tolerance * s₁.

    Or where what the values lack, of second order, is little. For each p >= i, with push the norm of the last block's step,
    σᵢ² - θᵢ² <= push² Σ_{j<=p} rⱼ² / (θ_p² - θ_{p+1}²).
    """
    squares, residuals = ritz.squares, ritz.residuals
    scale = tolerance * squares[0].sqrt()
    lack = _lack(ritz, push)[:k]
    values = (lack / (scale * torch.maximum(2 * squares[:k].sqrt(), scale))).max()
    error = lack.sum() / (EXCESS * squares[k:].sum() + 1e-300)
    return float(torch.minimum(torch.maximum(values, error), residuals[:k].max() / scale.square()))


def _above(ritz: _Ritz, k: int, push: float, least: float) -> float:
    """How many times too much value k, the first one that is not wanted, may lack to be below `least`: by its residual, or as
    _lack has it, which says little where the values behind it are flat."""
    room, lack = least - float(ritz.squares[k]), _lack(ritz, push)[k:]
    if not 0 < room < math.inf:  # no limit, or more within it than are wanted
        return 0.0
    return min(push * float(ritz.residuals[k].sqrt()), *lack[:1].tolist(), math.inf) / room


def _lack(ritz: _Ritz, push: float) -> Tensor:
    """At most how much each squared value but the last is too small."""
    gaps = (ritz.squares[:-1] - ritz.squares[1:]).clamp(min=1e-300)
    lack = push**2 * ritz.residuals.cumsum(0)[:-1] / gaps
    return lack.flip(0).cummin(0).values.flip(0)


def _reach(squares: Tensor, rank: int) -> float:
    """At most how much Σ s² the first `rank` values hold, judged by the first half of the Ritz values, which are nearly right."""
    p = len(squares) // 2
    return float(squares[:p].sum() + squares[p] * max(rank - p, 0))


def _squared_norm(w: Tensor, half: float) -> float:
    """‖half² w‖_F², summed in float64."""
    return squared_norm(w) * half * half * half * half


def _full(matrix: _Matrix, wanted: Callable[[Tensor], int]) -> Tensor:
    """The wanted leading left vectors (k, n) float64: eigenvectors of w wᵀ (n, n), w's short side, in float64.

    Its rounding, 1e-16 s₁², blurs only vectors of values below 1e-8 s₁, less than float32 resolves, and _finish takes the values
    from w itself. At 2048 x 5632 on one thread this takes 2.5 s where LAPACK's float32 svd takes 9.5 s.
    """
    n = matrix.w.shape[0]
    gram = torch.zeros(n, n, dtype=torch.float64, device=matrix.w.device)
    for columns in matrix.w.split(max(CHUNK // n, 1), 1):
        part = columns.double() * matrix.half * matrix.half
        for i in range(0, n, 256):  # eigh reads the lower triangle
            gram[i : i + 256, : i + 256].addmm_(part[i : i + 256], part[: i + 256].T)
    squares, vectors = torch.linalg.eigh(gram)
    return vectors.flip(1)[:, : wanted(squares.flip(0).clamp_(min=0))].T


def _exact(matrix: _Matrix, k: int) -> Svd:
    """The same from LAPACK's decomposition of w in float64."""
    return Svd(
        *torch.linalg.svd(matrix.w.double() * matrix.half * matrix.half, full_matrices=False)
    ).top(k)


def _finish(matrix: _Matrix, left: Tensor, k: int) -> Svd:
    """The k triplets of leftᵀ left w, float64. Householder's QR puts orthonormal vectors also where they are missing or null."""
    left = torch.linalg.qr(pad(left, (0, 0, 0, k - len(left))).T).Q
    q, r = torch.linalg.qr(matrix.rows(left.T.to(matrix.w.dtype)).T.double())
    x, s, yh = torch.linalg.svd(r.T)
    return Svd(left @ x, s, yh @ q.T)


def leading(
    w: Tensor, most: int, energy: float | None, ratio: float | None = None, near: Svd | None = None
) -> tuple[Svd, float]:
    """The leading triplets of w, and Σ s² over all of them: `most`, or at most that many, those that keep the share `energy`, or
    those down to 1/`ratio` of the first. `near`: as in `truncated_svd`."""
    if energy is not None:
        return svd_for_energy(w, energy, most)
    if ratio is not None:
        return svd_for_ratio(w, ratio, most)
    return truncated_svd(w, most, near=near), _squared_norm(w, 1.0)

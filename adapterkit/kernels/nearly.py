"""A low-rank approximation that is nearly the best one, of matrices that have none: what quantization leaves is noise, its singular
values close together, and nobody asks for the vectors of each."""

import math

import torch
from torch import Tensor

from adapterkit.kernels.lowrank import Svd
from adapterkit.kernels.sums import squared_norm

EXTRA = 8  # vectors of a block beyond the rank
STEPS = 24  # blocks at most
FEWEST = 3  # what the first block holds, of given directions or of a few that stand out, says nothing of the next gains
SLOWEST = 0.9  # of a step's gain the next one is expected to bring at most this share
NOISE = 1e-9  # of all energy: less is float32's rounding
PLAIN = (1e-9, 1e9)  # largest magnitudes whose products float32 holds


def nearly_best(
    w: Tensor,  # (n, m) float32
    rank: int,
    excess: float = 5e-5,  # of the error of the best approximation: what this one's may be larger
    start: Tensor
    | None = None,  # (k, m): directions to begin with, those of a matrix like this one
    squares: float | None = None,  # ‖w‖_F², where it is known
) -> Svd:
    """u s vᵀ of that rank with ‖w - u s vᵀ‖_F about (1 + excess) times the least possible, or float32's rounding if that is more.

    Randomised block Krylov (Musco and Musco, arXiv:1504.05477): q spans blocks u₁ = w g, uᵢ₊₁ = w wᵀ uᵢ, and the triplets are those
    of q qᵀ w. It ends when the energy that further blocks would add, by the last two gains, is less than `excess` allows, or when
    they have no new direction. Raises ValueError for values that are not finite.
    """
    whole = w if w.is_contiguous() else w.T
    largest = max(abs(float(x)) for x in torch.aminmax(whole))
    if not math.isfinite(largest):
        raise ValueError("the matrix holds values that are not finite")
    if largest and not PLAIN[0] < largest < PLAIN[1]:
        unit = 2.0 ** max(math.frexp(largest)[1], -126)  # a subnormal one would be taken for 0
        u, s, vh = nearly_best(w / unit, rank, excess, start)
        return Svd(u, s * unit, vh)
    total = squared_norm(whole) if squares is None else squares
    turned = (
        w.shape[0] > w.shape[1]
    )  # then u belongs to the columns: directions to begin with are always those of the long side
    u, s, vh = _krylov(w.T if turned else w, rank, excess, start, total)
    return Svd(vh.T, s, u.T) if turned else Svd(u, s, vh)


def _krylov(w: Tensor, rank: int, excess: float, start: Tensor | None, total: float) -> Svd:
    n, m = w.shape
    k = min(rank, n)
    block = min(k + EXTRA, n)
    panel = _right(w, _start(w, block, start))
    q, b = w.new_zeros(n, 0), w.new_zeros(0, m)  # b = qᵀ w
    gram = torch.zeros(0, 0, dtype=torch.float64, device=w.device)
    kept, gains = 0.0, [math.inf]
    while True:
        u = _new(panel, q)
        new = _left(u, w)
        q, b = torch.cat([q, u], 1), torch.cat([b, new])
        cross = b.double() @ new.T.double()
        gram = torch.cat([torch.cat([gram, cross[: len(gram)]], 1), cross.T])
        squares, vectors = torch.linalg.eigh(gram)
        found = float(squares[-k:].clamp(min=0).sum())
        gains.append(found - kept)
        kept = found
        ratio = min(gains[-1] / gains[-2], SLOWEST) if gains[-2] > 0 else 0.0
        left = gains[-1] * ratio / (1 - ratio)
        enough = len(gains) > FEWEST and left <= 2 * excess * max(total - kept, NOISE * total)
        if enough or not u.shape[1] or q.shape[1] == n or len(gains) > STEPS:
            break
        panel = _right(w, new[: n - q.shape[1]])
    x = vectors[:, -k:].flip(1).to(w.dtype)
    s = squares[-k:].flip(0).clamp(min=0).sqrt()
    s = torch.where(s > 1e-7 * s[0], s, 0).to(w.dtype)
    vh = torch.where(s[:, None] > 0, x.T @ b / s[:, None], 0)
    return Svd(q @ x, s, vh)


# As the product of a matrix in rows, whichever of w and wᵀ is one: the other way takes up to twice as long.


def _left(u: Tensor, w: Tensor) -> Tensor:
    """uᵀ w, u (n, j)."""
    return u.T @ w if w.is_contiguous() else (w.T @ u).T


def _right(w: Tensor, y: Tensor) -> Tensor:
    """w yᵀ, y (j, m)."""
    return w @ y.T if w.is_contiguous() else (y @ w.T).T


def _new(
    panel: Tensor,  # (n, j)
    q: Tensor,  # (n, p), orthonormal
) -> Tensor:  # (n, at most j)
    """An orthonormal basis of what the panel's columns have beside q. Of columns that depend on the others only rounding is left,
    which lies in q's span too; they are left out, and the others, which may then depend on each other, freed of it once more."""
    u, clean = torch.linalg.qr(panel - q @ (q.T @ panel)).Q, False
    while not clean:
        u = u - q @ (q.T @ u)
        sizes = u.norm(dim=0)
        clean = not len(sizes) or bool(sizes.min() > 0.9)
        u = torch.linalg.qr(u[:, sizes > 0.5]).Q
    return u


def _start(w: Tensor, block: int, start: Tensor | None) -> Tensor:
    """g (block, m), random but for the given directions."""
    m = w.shape[1]
    generator = torch.Generator().manual_seed(w.shape[0] * 1_000_003 + m)
    g = torch.randn(block, m, generator=generator, dtype=w.dtype).to(w.device)
    if start is not None and start.shape[1] == m:
        g[: len(start)] = start[:block] * m**0.5
    return g

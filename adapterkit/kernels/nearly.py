"""A low-rank approximation that is nearly the best one, of matrices that have none: what quantisation leaves is noise, its singular
values close together, and nobody asks for the vectors of each."""

import math

import torch
from torch import Tensor

from adapterkit.kernels.lowrank import Svd

EXTRA = 8  # vectors of a block beyond the rank
STEPS = 24  # blocks at most
SLOWEST = 0.9  # of a step's gain the next one is expected to bring at most this share


def nearly_best(
    w: Tensor,  # (n, m) float32
    rank: int,
    excess: float = 5e-5,  # of the error of the best approximation: what this one's may be larger
    start: Tensor | None = None,  # (k, m): directions to begin with, those of a matrix like this one
) -> Svd:
    """u s vᵀ of that rank with ‖w - u s vᵀ‖_F about (1 + excess) times the least possible.

    Randomised block Krylov (Musco and Musco, arXiv:1504.05477): q spans blocks u₁ = w g, uᵢ₊₁ = w wᵀ uᵢ, and the triplets are those
    of q qᵀ w. It ends when the energy that further blocks would add, by the last two gains, is less than `excess` allows.
    """
    if w.shape[0] > w.shape[1]:
        u, s, vh = nearly_best(w.T, rank, excess, start)  # the directions are those of the long side, wherever it is
        return Svd(vh.T, s, u.T)
    n, m = w.shape
    k = min(rank, n)
    block = min(k + EXTRA, n)
    total = float(torch.linalg.vector_norm(w, dtype=torch.float64)) ** 2
    panel = _start(w, block, start)
    q, b = w.new_zeros(n, 0), w.new_zeros(0, m)  # b = qᵀ w
    gram = torch.zeros(0, 0, dtype=torch.float64, device=w.device)
    kept, gains = 0.0, [math.inf]
    while True:
        u = panel - q @ (q.T @ panel)
        u = torch.linalg.qr(u - q @ (q.T @ u)).Q
        new = u.T @ w
        cross = (b @ new.T).double()
        gram = torch.cat([torch.cat([gram, cross], 1), torch.cat([cross.T, (new @ new.T).double()], 1)])
        q, b = torch.cat([q, u], 1), torch.cat([b, new])
        squares, vectors = torch.linalg.eigh(gram)
        found = float(squares[-k:].clamp(min=0).sum())
        gains.append(found - kept)
        kept = found
        ratio = min(gains[-1] / gains[-2], SLOWEST) if gains[-2] > 0 else 0.0
        left = gains[-1] * ratio / (1 - ratio)
        if (len(gains) > 2 and left <= 2 * excess * max(total - kept, 0.0)) or len(q.T) + block > n or len(gains) > STEPS:
            break
        panel = w @ new.T
    x = vectors[:, -k:].flip(1).to(w.dtype)
    s = squares[-k:].flip(0).clamp(min=0).sqrt()
    vh = x.T @ b / s.clamp(min=torch.finfo(torch.float32).tiny)[:, None].to(w.dtype)
    return Svd(q @ x, s.to(w.dtype), vh)


def _start(w: Tensor, block: int, start: Tensor | None) -> Tensor:
    """w g (n, block), g random but for the given directions."""
    m = w.shape[1]
    generator = torch.Generator().manual_seed(w.shape[0] * 1_000_003 + m)
    g = torch.randn(block, m, generator=generator, dtype=w.dtype).to(w.device)
    if start is not None and start.shape[1] == m:
        g[: len(start)] = start[:block] * m**0.5
    return w @ g.T

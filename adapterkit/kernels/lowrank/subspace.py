"""Approximate a matrix of close singular values, such as a quantization error, with nearly the
least possible error. Single triplets are not accurate."""

import math

import torch
from torch import Tensor

from adapterkit.kernels import dense
from adapterkit.kernels.lowrank import krylov
from adapterkit.kernels.lowrank.algebra import Svd
from adapterkit.kernels.lowrank.krylov import OVERSAMPLING, Matrix, Space
from adapterkit.kernels.sums import squared_norm

MAX_BLOCKS = 24
MIN_BLOCKS = (
    3  # the first gain comes from the start, or from outliers: it does not predict the next
)
MAX_GAIN_RATIO = 0.9  # the next block is expected to gain at most this share of the last gain
NOISE = 1e-9  # share of all energy: less is float32's rounding


def near_optimal_svd(
    w: Tensor,  # (n, m) float32
    rank: int,
    excess: float = 5e-5,  # allowed excess over the error of the best approximation
    start: Svd | None = None,  # from a similar matrix: the search begins with its vectors
    squares: float | None = None,  # ‖w‖_F², where it is known
) -> Svd:
    """u s vᵀ of that rank with ‖w - u s vᵀ‖_F about (1 + excess) times the least possible, or
    float32's rounding if that is more.

    Randomized block Krylov (Musco and Musco, arXiv:1504.05477): q spans blocks u₁ = w g, uᵢ₊₁ = w
    wᵀ uᵢ, and the triplets are those of q qᵀ w. It stops if further blocks would add less energy
    than `excess` allows, estimated from the last two gains, or no new direction. Raises ValueError
    for values that are not finite.
    """
    matrix, transposed = krylov.wide(w)
    total = matrix.squares(squared_norm(w) if squares is None else squares)
    vectors = None if start is None else krylov.long_side(start, transposed)
    return krylov.restore(matrix, _approximate(matrix, rank, excess, vectors, total), transposed)


def _approximate(
    matrix: Matrix, rank: int, excess: float, start: Tensor | None, total: float
) -> Svd:
    n = matrix.w.shape[0]
    k = min(rank, n)
    panel = matrix.right(_first_block(matrix, min(k + OVERSAMPLING, n), start))
    space, energy, gains = Space.empty(matrix), 0.0, [math.inf]
    while True:
        u = krylov.new_directions(space.q, panel)
        new = matrix.left(u)
        space = space.add(u, new)
        squares, vectors = dense.eigh(space.gram)
        before, energy = energy, float(squares[-k:].clamp(min=0).sum())
        gains.append(energy - before)
        ratio = min(gains[-1] / gains[-2], MAX_GAIN_RATIO) if gains[-2] > 0 else 0.0
        expected = gains[-1] * ratio / (1 - ratio)
        allowed = 2 * excess * max(total - energy, NOISE * total)
        enough = len(gains) > MIN_BLOCKS and expected <= allowed
        if enough or not u.shape[1] or space.q.shape[1] == n or len(gains) > MAX_BLOCKS:
            break
        panel = matrix.right(new[: n - space.q.shape[1]])
    q, b = space.q, space.b
    x = vectors[:, -k:].flip(1).to(q.dtype)
    s = squares[-k:].flip(0).clamp(min=0).sqrt()
    s = torch.where(s > 1e-7 * s[0], s, 0).to(q.dtype)
    vh = torch.where(s[:, None] > 0, x.T @ b / s[:, None], 0)
    return Svd(q @ x, s, vh)


def _first_block(matrix: Matrix, size: int, start: Tensor | None) -> Tensor:
    """g (size, m), random except for the start."""
    m = matrix.w.shape[1]
    g = krylov.gaussian(matrix, size, m, krylov.generator(matrix))
    if start is not None:
        g[: len(start)] = start[:size] * m**0.5
    return g

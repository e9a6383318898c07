"""The leading singular triplets of a weight, with a tolerance for their values: as fast for flat
spectra, whose leading values are close, as for decaying ones.

Randomized block Krylov on the short side (Musco and Musco, arXiv:1504.05477): blocks u₁ = w g, uᵢ₊₁
= w wᵀ uᵢ, triplets from Rayleigh-Ritz. It stops when the values no longer grow, because a bound by
residuals, as in `truncated`, needs half as many blocks again for flat spectra. If many blocks are
needed, the middle ones are multiplied in bfloat16 (at least twice as fast if the processor supports
it): a Krylov space tolerates inexact products, and their new directions are orthogonalized and
tested in float32.
"""

import math

import torch
from torch import Tensor

from adapterkit.kernels import dense
from adapterkit.kernels.lowrank import krylov
from adapterkit.kernels.lowrank.algebra import Svd
from adapterkit.kernels.lowrank.krylov import OVERSAMPLING, Matrix, Space
from adapterkit.kernels.lowrank.truncated import SMALL_SIDE, triplets, truncated_svd

EXACT_BLOCKS = 3  # blocks before estimating whether many more are needed
MANY_BLOCKS = 6  # more: bfloat16
CHECK_EVERY = 2  # blocks; the eigenvalues of the projection cost as much as half a block
MAX_SHARE = 0.5  # share of the short side that the blocks may fill
SMALL = 1e-2  # of the largest value: smaller ones are as exact as a value of that size
MAX_RATIO = 0.9  # of two gains: a larger ratio does not predict the remaining growth
MULTIPLE = 16  # of a block's width: other widths have half the speed in bfloat16


class _Growth:
    """Estimates the missing growth of the k largest squared values from their last two gains."""

    def __init__(self, k: int, tolerance: float) -> None:
        self.k, self.tolerance = k, tolerance
        self.squares: Tensor | None = None
        self.ratio, self.gain = 0.5, math.inf  # the gain as a multiple of the tolerance

    def lack(self, squares: Tensor) -> float:
        """The missing growth relative to the tolerance; squares (K,) falling."""
        squares = squares[: self.k].clamp(min=0)
        before, self.squares = self.squares, squares
        if before is None or len(before) < self.k:
            return math.inf
        unit = torch.maximum(squares, (SMALL**2) * squares[0]).sqrt()
        allowed, last = self.tolerance * unit * 2 * squares.sqrt(), self.gain
        self.gain = float(((squares - before) / allowed.clamp(min=1e-300)).max())
        if 0 < last < math.inf:
            self.ratio = min(max(self.gain / last, 0.0), MAX_RATIO)
        return self.gain * self.ratio / (1 - self.ratio)


def leading_triplets(
    w: Tensor,  # (n, m), float32 or float64
    rank: int,
    tolerance: float = 1e-5,  # of the singular values, relative to each, or to SMALL · s₁
) -> Svd:
    """The leading min(rank, n, m) triplets of w, in w's dtype.

    Raises ValueError for a rank below 1, and for matrices as `krylov.wide` does.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, not {rank}")
    matrix, transposed = krylov.wide(w)
    n = min(w.shape)
    block = math.ceil((rank + OVERSAMPLING) / MULTIPLE) * MULTIPLE
    if n <= SMALL_SIDE or (EXACT_BLOCKS + 1) * block > MAX_SHARE * n:
        return truncated_svd(w, rank)
    svd = _search(matrix, rank, block, tolerance)
    return truncated_svd(w, rank) if svd is None else krylov.restore(matrix, svd, transposed)


def randomized_triplets(
    w: Tensor,  # (n, m)
    rank: int,
    rounds: int,
) -> Svd:
    """The result of `torch.svd_lowrank` for seed 0, on a CPU bit for bit: a random block of that
    width (Halko, Martinsson, Tropp 2011, arXiv:0909.4061, algorithm 4.4), so many rounds with wᵀ
    and w."""
    tall = w if w.shape[0] >= w.shape[1] else w.T
    short = tall.shape[1]
    numbers = torch.Generator().manual_seed(0)
    block = krylov.gaussian(Matrix(w, 1.0), short, min(rank, short), numbers)
    q, _ = dense.qr(tall @ block)
    for _ in range(rounds):
        v, _ = dense.qr(tall.T @ q)
        q, _ = dense.qr(tall @ v)
    u, s, vh = dense.svd(q.T @ tall)
    u = q @ u
    return Svd(u, s, vh) if tall is w else Svd(vh.T, s, u.T)


def _search(matrix: Matrix, k: int, block: int, tolerance: float) -> Svd | None:
    """Search; None if half of the short side is not enough."""
    n, m = matrix.w.shape
    first = matrix.right(krylov.gaussian(matrix, block, m, krylov.generator(matrix)))
    space, lack = _expand(matrix, k, first, tolerance, int(MAX_SHARE * n) // block, EXACT_BLOCKS)
    if lack > 1:
        near = _inexact(matrix, k, space, block, tolerance)
        if near is None:
            return None
        space, lack = _expand(matrix, k, near, tolerance, int(MAX_SHARE * n) // block, math.inf)
    if lack > 1:
        return None
    vectors = dense.eigh(space.gram)[1][:, -k:].flip(1)
    return triplets(matrix, (space.q.double() @ vectors).T, k)


def _expand(
    matrix: Matrix, k: int, panel: Tensor, tolerance: float, most: int, patience: float
) -> tuple[Space, float]:
    """The space, and the missing growth of its values relative to the tolerance: at most 1, or more
    after `most` blocks, or if block `patience` finds that many more are needed."""
    space, growth = Space.empty(matrix), _Growth(k, tolerance)
    lack = math.inf
    for count in range(1, most + 1):
        u = krylov.new_directions(space.q, panel)
        if not u.shape[1]:
            return space, 0.0  # nothing beyond
        space = space.add(u, matrix.left(u))
        lack = growth.lack(dense.eigvalsh(space.gram).flip(0))
        if lack <= 1:
            return space, lack
        full = u.shape[1] == panel.shape[1]
        if count >= patience and full and lack * growth.ratio**MANY_BLOCKS > 1:
            break
        panel = matrix.right(space.b[-u.shape[1] :])
    return space, lack


def _inexact(matrix: Matrix, k: int, space: Space, block: int, tolerance: float) -> Tensor | None:
    """Block Lanczos on bfloat16 products from the space on: the `block` leading Ritz vectors (n,
    block); None if half of the short side is not enough."""
    n, size = space.q.shape
    rough = Matrix(matrix.w.bfloat16(), matrix.half)
    most = int(MAX_SHARE * n)
    basis = space.q.new_empty(n, most)
    basis[:, :size] = space.q
    projection = space.q.new_zeros(most, most)  # basisᵀ w wᵀ basis, its upper triangle
    projection[:size, :size] = space.gram
    growth = _Growth(k, tolerance)
    panel = matrix.right(space.b[-block:])
    for count in range(1, (most - size) // block):
        known = basis[:, :size]
        panel = torch.addmm(panel, known, known.T @ panel, alpha=-1)
        panel = torch.addmm(panel, known, known.T @ panel, alpha=-1)
        u, beyond = dense.qr(panel)
        basis[:, size : size + block] = u
        projection[size - block : size, size : size + block] = beyond.T
        size += block
        panel = rough.right(rough.left(u.bfloat16())).to(u.dtype)
        projection[size - block : size, size - block : size] = u.T @ panel
        if count % CHECK_EVERY == 0:
            square = projection[:size, :size].triu()
            square += square.triu(1).T
            if growth.lack(dense.eigvalsh(square).flip(0)) <= 1:
                return basis[:, :size] @ dense.eigh(square)[1][:, -block:].flip(1)
    return None

"""Block Krylov subspaces of a dense matrix (Musco and Musco, arXiv:1504.05477): scaled products
with it, first blocks, and new directions of a block.

Three methods use them, with a stopping rule each: `truncated` (triplets to a tolerance; vectors are
rows), `leading` (values to a tolerance) and `subspace` (the error of the approximation), whose
vectors are columns.
"""

import math
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from adapterkit.kernels import dense
from adapterkit.kernels.lowrank.algebra import Svd

OVERSAMPLING = 8  # vectors of a block beyond the rank: the gap behind them decides the speed
SAFE_RANGE = (1e-9, 1e9)  # largest magnitudes whose products float32 holds
FLOOR = {  # of a block's largest singular value: smaller ones are rounding, not directions
    torch.float32: 2.0**-22,
    torch.float64: 1e-9,
}


class Matrix(NamedTuple):
    """half² · w, w (n, m), n <= m. A product applies half before and after, so 1e30 does not
    overflow."""

    w: Tensor
    half: float

    def rows(self, x: Tensor) -> Tensor:
        """x (k, n) -> x @ w (k, m)."""
        return x @ self.w if self.half == 1 else (x * self.half @ self.w).mul_(self.half)

    def columns(self, y: Tensor) -> Tensor:
        """y (k, m) -> y @ wᵀ (k, n)."""
        return y @ self.w.T if self.half == 1 else (y * self.half @ self.w.T).mul_(self.half)

    # As the product of a matrix in rows, whichever of w and wᵀ is one: otherwise it takes up to
    # twice as long.

    def left(self, u: Tensor) -> Tensor:
        """u (n, j) -> uᵀ @ w (j, m)."""
        u = u if self.half == 1 else u * self.half
        product = u.T @ self.w if self.w.is_contiguous() else (self.w.T @ u).T
        return product if self.half == 1 else product.mul_(self.half)

    def right(self, y: Tensor) -> Tensor:
        """y (j, m) -> w @ yᵀ (n, j)."""
        y = y if self.half == 1 else y * self.half
        product = self.w @ y.T if self.w.is_contiguous() else (y @ self.w.T).T
        return product if self.half == 1 else product.mul_(self.half)

    def squares(self, total: float) -> float:
        """‖w‖_F² -> ‖half² · w‖_F²."""
        return total * self.half * self.half * self.half * self.half

    def values(self, s: Tensor) -> Tensor:
        """Singular values of half² · w -> those of w."""
        return s / self.half / self.half


class Space(NamedTuple):
    """Orthonormal columns q (n, K), b = qᵀ w (K, m), gram = b bᵀ in float64."""

    q: Tensor
    b: Tensor
    gram: Tensor

    @classmethod
    def empty(cls, matrix: Matrix) -> "Space":
        n, m = matrix.w.shape
        zeros = matrix.w.new_zeros
        return cls(zeros(n, 0), zeros(0, m), zeros(0, 0, dtype=torch.float64))

    def add(self, u: Tensor, new: Tensor) -> "Space":
        """Add to the basis, with the columns u; `new`: uᵀ w."""
        b = torch.cat([self.b, new])
        cross = b.double() @ new.T.double()
        size = len(self.gram)
        gram = torch.cat([torch.cat([self.gram, cross[:size]], 1), cross.T])
        return Space(torch.cat([self.q, u], 1), b, gram)


def wide(w: Tensor) -> tuple[Matrix, bool]:
    """Return w or wᵀ, the wide one, as a view; half², a power of 2 that brings the largest element
    near 1 if products would leave float32's range, else 1; and whether it is wᵀ.

    Raises ValueError unless it is a non-empty float32 or float64 matrix of finite values.
    """
    if w.dtype not in FLOOR or w.ndim != 2 or not w.numel():
        raise ValueError(
            f"expected a float32 or float64 matrix, not {w.dtype} of shape {tuple(w.shape)}"
        )
    low, high = (float(x) for x in torch.aminmax(w))
    largest = max(-low, high)
    if not math.isfinite(low + high):
        raise ValueError("the matrix holds values that are not finite")
    safe = not largest or SAFE_RANGE[0] < largest < SAFE_RANGE[1]
    half = 1.0 if safe else 2.0 ** -(math.frexp(largest)[1] // 2)
    w = w if 1 in w.stride() else w.contiguous()
    transposed = w.shape[0] > w.shape[1]
    return Matrix(w.T if transposed else w, half), transposed


def restore(matrix: Matrix, svd: Svd, transposed: bool) -> Svd:
    """Back to w's own scale, orientation and dtype."""
    u, s, vh = (part.to(matrix.w.dtype) for part in (svd.u, matrix.values(svd.s), svd.vh))
    return Svd(vh.T, s, u.T) if transposed else Svd(u, s, vh)


def long_side(svd: Svd, transposed: bool) -> Tensor:  # (k, m)
    """The singular vectors on the long side of the matrix, as rows."""
    return svd.u.T if transposed else svd.vh


def generator(matrix: Matrix) -> Generator:
    """The random generator of first blocks, a function of the shape."""
    n, m = matrix.w.shape
    return torch.Generator().manual_seed(n * 1_000_003 + m)


def gaussian(matrix: Matrix, count: int, width: int, numbers: Generator) -> Tensor:
    """A random block (count, width)."""
    block = torch.randn(count, width, generator=numbers, dtype=matrix.w.dtype)
    return block.to(matrix.w.device)


class Expansion(NamedTuple):
    """panel (b, m) = inside @ basis + beyond @ rows."""

    rows: Tensor  # (r, m) r <= b, orthonormal
    inside: Tensor  # (b, K) float64
    beyond: Tensor  # (b, r) float64
    size: float  # ‖beyond‖₂


def expand(basis: Tensor, panel: Tensor, top: float) -> Expansion:
    """panel (b, m) = inside @ basis (K, m) + beyond @ rows, with rows orthonormal, also to the
    basis; directions at the rounding level of the panel's largest, or of `top`, are dropped."""
    inside = panel @ basis.T
    remainder = torch.addmm(panel, inside, basis, alpha=-1)
    rows, beyond = _frame(remainder, FLOOR[panel.dtype], top)
    size = float(dense.svdvals(beyond).amax()) if beyond.numel() else 0.0
    # below 0.1 of a unit vector: rounding, in the basis's span
    rows, turn = _frame(torch.addmm(rows, rows @ basis.T, basis, alpha=-1), 0.1, 1.0)
    return Expansion(rows, inside.double(), beyond @ turn, size)


def _frame(panel: Tensor, noise: float, top: float) -> tuple[Tensor, Tensor]:
    """rows (r, m) orthonormal, t (b, r) float64, panel = t @ rows up to directions below noise ·
    max(top, the largest)."""
    q, r = dense.qr(panel.T.double())
    x, s, yh = dense.svd(r.T)
    keep = int((s > noise * s[:1].clamp(min=top)).sum())
    return (yh[:keep] @ q.T).to(panel.dtype), x[:, :keep] * s[:keep]


def new_directions(
    basis: Tensor,  # (n, K), orthonormal columns
    panel: Tensor,  # (n, b)
) -> Tensor:  # (n, r), r <= b, orthonormal columns, also to the basis
    """The directions that the panel's columns add to the basis: as `expand`, but without
    coefficients, in the panel's dtype, and a few times as fast.

    Dependent columns leave only rounding, which is in the basis's span too. They are dropped, and
    the others, which may then depend on each other, are orthogonalized again.
    """
    u, clean = dense.qr(panel - basis @ (basis.T @ panel))[0], False
    while not clean:
        u = u - basis @ (basis.T @ u)
        sizes = u.norm(dim=0)
        clean = not len(sizes) or bool(sizes.min() > 0.9)
        u, _ = dense.qr(u if clean else u[:, sizes > 0.5])
    return u

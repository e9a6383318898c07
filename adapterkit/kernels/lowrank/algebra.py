"""Operations on products left @ right that are never multiplied out: norms, inner products,
singular values, refits.

A product is a pair `left (n, R)`, `right (R, m)`; a delta scale * b @ a is one, and a sum of deltas
is the stack of its parts. All arithmetic is float64: the matrices are thin, and their cores a few
hundred wide.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from adapterkit.core.lazy import Tensor, torch
from adapterkit.kernels import dense
from adapterkit.kernels.sums import floats

WELL_CONDITIONED = 1e-3  # smallest singular value over the largest one
ROUNDING = 1e-12  # of a sum of squares


class Product(NamedTuple):
    """left @ right, not multiplied out."""

    left: Tensor  # (n, R) float64
    right: Tensor  # (R, m) float64

    @property
    def rank(self) -> int:
        return self.left.shape[1]

    def dense(self) -> Tensor:
        return self.left @ self.right


class Svd(NamedTuple):
    """u @ diag(s) @ vh, s falling; k columns."""

    u: Tensor  # (n, k)
    s: Tensor  # (k,)
    vh: Tensor  # (k, m)

    def top(self, rank: int) -> "Svd":
        return Svd(self.u[:, :rank], self.s[:rank], self.vh[:rank])


def products_of(
    a: Tensor,  # (experts * r, m), the expert slowest
    b: Tensor,  # (n, r * experts), the expert fastest
    experts: int,
) -> list[Product]:
    """b @ a of each expert of a stack in PEFT's layout."""
    right, left = a.view(experts, -1, a.shape[1]), b.view(b.shape[0], -1, experts)
    return [Product(left[:, :, e], right[e]) for e in range(experts)]


def as_product(delta: Product | Tensor) -> Product:
    """A dense matrix as itself times the identity of its shorter side."""
    if isinstance(delta, Product):
        return delta
    delta = delta.double()
    one = torch.eye(min(delta.shape), dtype=torch.float64, device=delta.device)
    return Product(delta, one) if delta.shape[1] <= delta.shape[0] else Product(one, delta)


def stack_products(products: Sequence[Product], weights: Sequence[float] | None = None) -> Product:
    """Σ weight * left @ right as one product of rank Σ R; only the scaling of left rounds."""
    weights = [1.0] * len(products) if weights is None else weights
    return Product(
        torch.cat([p.left * w for p, w in zip(products, weights, strict=True)], 1),
        torch.cat([p.right for p in products], 0),
    )


def svd(product: Product) -> Svd:
    """The singular value decomposition of left @ right, at most min(n, m, R) values: QR of both
    sides, then of the core R x R.

    left = Q S, rightᵀ = P T, core = S Tᵀ = U s Vᵀ, so left @ right = (Q U) s (P V)ᵀ.
    """
    s, times_q = _triangular(product.left)
    t, times_p = _triangular(product.right.T)
    u, values, vh = dense.svd(s @ t.T)
    return Svd(times_q(u), values, times_p(vh.T).T)


def _triangular(x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The triangle R of x = Q R, and y -> Q y.

    If x is tall and well conditioned, R comes from Cholesky's decomposition of xᵀx and Q y = x (R⁻¹
    y): a few matrix products, twice as fast as Householder's way. Its error is the square of x's
    condition times 1e-16, so the condition is checked first.
    """
    if x.shape[0] > 2 * x.shape[1]:
        r, failed = torch.linalg.cholesky_ex(x.T @ x, upper=True)
        values = dense.svdvals(r) if not failed else r.new_zeros(1)
        if values[-1] > values[0] * WELL_CONDITIONED:
            return r, lambda y: x @ torch.linalg.solve_triangular(r, y, upper=True)
    q, r = torch.linalg.qr(x)
    return r, lambda y: q @ y


def inner(one: Product, other: Product) -> float:
    """⟨X, Y⟩ = tr(Xᵀ Y) = Σ (leftᵀ left') * (right right'ᵀ)."""
    return float(_inner(one, other))


def _inner(one: Product, other: Product) -> Tensor:
    return torch.sum((one.left.T @ other.left) * (one.right @ other.right.T))


def norm(product: Product) -> float:
    """‖left @ right‖_F."""
    return max(inner(product, product), 0.0) ** 0.5


def gram(products: Sequence[Product]) -> Tensor:
    """All inner products ⟨Xᵢ, Xⱼ⟩, (k, k) float64."""
    table = torch.zeros(len(products), len(products), dtype=torch.float64)
    pairs = [(i, j) for i in range(len(products)) for j in range(i + 1)]
    values = floats([_inner(products[i], products[j]) for i, j in pairs])
    for (i, j), value in zip(pairs, values, strict=True):
        table[i, j] = table[j, i] = value
    return table


def rank_for_energy(s: Tensor, energy: float, total: float | None = None) -> int:
    """The smallest k >= 1 with Σ_{i<=k} s² >= energy * Σ s².

    `total` is Σ s² over all singular values if `s` has only the first ones; if these are too few,
    the result is len(s) + 1. Values below float64's noise of the largest one count as zero; values
    that keep the share exactly, up to rounding, are enough.
    """
    squares = s.double().square()
    squares = torch.where(squares <= squares.max() * 1e-28, 0, squares) if len(s) else squares
    beyond = 0.0 if total is None else max(total - float(squares.sum()), 0.0)
    # tails[k]: what is lost when k values are kept
    tails: list[float] = (squares.flip(0).cumsum(0).flip(0) + beyond).tolist()
    whole = tails[0] if tails else beyond
    allowed = (1 - energy) * whole * (1 + ROUNDING)
    enough = [k for k in range(1, len(s)) if tails[k] <= allowed]
    if enough:
        return enough[0]
    return max(len(s), 1) if beyond <= allowed else len(s) + 1


def refit(svd: Svd, rank: int) -> tuple[Tensor, Tensor]:
    """Factors a (rank, m), b (n, rank) of the best approximation of that rank, their norms
    balanced: b = U √s, a = √s Vᵀ.

    Ranks above the number of singular values are padded with zeros. PEFT puts s into b alone; the
    product is the same.
    """
    root = svd.s[:rank].sqrt()
    b, a = svd.u[:, :rank] * root, svd.vh[:rank] * root[:, None]
    if rank > len(root):
        b = torch.nn.functional.pad(b, (0, rank - len(root)))
        a = torch.nn.functional.pad(a, (0, 0, 0, rank - len(root)))
    return a, b


def balanced_factors(svd: Svd, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """a (rank, in) and b (out, rank) of equal norms with scale·b@a = u s vᵀ."""
    a, b = refit(Svd(svd.u, svd.s / scale, svd.vh), rank)
    return a.contiguous(), b.contiguous()


def balance(product: Product) -> tuple[Tensor, Tensor]:
    """Factors a, b of the same product, up to rounding, with equal norms in each rank-one term."""
    left, right = product.left.norm(dim=0), product.right.norm(dim=1)
    ratio = torch.where((left > 0) & (right > 0), (right / left).sqrt(), 1.0)
    return product.right / ratio[:, None], product.left * ratio


def fix_sign(vector: Tensor) -> Tensor:
    """The vector or its negative, so that the (first) element of largest magnitude is positive."""
    return -vector if len(vector) and vector[vector.abs().argmax()] < 0 else vector

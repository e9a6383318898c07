"""Measures of the difference of two tensors: sums over blocks of both, and the singular values of
their difference from a sketch.

A difference D (n, m) is never in memory at once. Up to 512 columns its Gram matrix DᵀD is summed,
which is exact. Above, two passes over its rows (Halko, Martinsson, Tropp 2011, arXiv:0909.4061, on
the row side): Z = Ω D with 128 Gaussian rows, Q = orth(Zᵀ), then the singular values of D Q. They
are exact if min(n, m) <= 128, and otherwise never above the true ones.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adapterkit.kernels.lowrank.algebra import Product

SKETCH = 128  # rows of Ω: at most so many singular values are estimated
EXACT = 512  # columns up to which DᵀD is summed instead


def same_values(a: Tensor, b: Tensor) -> bool:
    """Return whether all values are equal, with NaN equal to NaN."""
    return torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all())


def rounds_to(a: Tensor, b: Tensor) -> bool:
    """Return whether b is a rounded to b's dtype, with no finite value become infinite."""
    rounded = a.to(b.dtype)
    return same_values(rounded, b) and bool((rounded.isinf() == a.isinf()).all())


def base_and_difference(
    a: Tensor,  # (n, m), any float dtype
    b: Tensor,  # (n, m)
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """A and B - A in `dtype`; both are 0 where A and B are the same NaN or infinity, so that equal
    values do not count."""
    a, b = a.to(dtype), b.to(dtype)
    difference = b - a
    if not math.isfinite(float(difference.sum())):
        same = (a == b) | (a.isnan() & b.isnan())
        a, difference = a.masked_fill(same & ~a.isfinite(), 0), difference.masked_fill(same, 0)
    return a, difference


@dataclass
class PairSums:
    """‖A‖², ⟨A, D⟩, ‖D‖², max |D| and the number of elements that differ, over blocks of A and
    B = A + D, in float64."""

    squares: float = 0.0
    dot: float = 0.0
    squared_error: float = 0.0
    largest: float = 0.0
    differing: int = 0

    def add(
        self,
        a: Tensor,  # (n, m)
        b: Tensor,  # (n, m)
    ) -> Tensor:  # D (n, m) float64
        a, difference = base_and_difference(a, b)
        flat, base = difference.flatten(), a.flatten()
        self.squares += float(torch.dot(base, base))
        self.dot += float(torch.dot(base, flat))
        self.squared_error += float(torch.dot(flat, flat))
        self.differing += int(torch.count_nonzero(flat))
        low, high = map(float, torch.aminmax(flat)) if flat.numel() else (0.0, 0.0)
        largest = max(-low, high)
        self.largest = largest if math.isnan(largest) or largest > self.largest else self.largest
        return difference

    @property
    def relative(self) -> float:
        """‖D‖ / ‖A‖: 0 if nothing differs, infinite if A is zero."""
        return relative(math.sqrt(self.squared_error), math.sqrt(self.squares))

    @property
    def cosine(self) -> float:
        """⟨A, B⟩ / (‖A‖ ‖B‖), NaN if one of them is zero."""
        return cosine(
            self.squares, self.squares + self.dot, self.squares + 2 * self.dot + self.squared_error
        )


def relative(error: float, norm: float) -> float:
    """error / norm, with 0 / 0 = 0, and infinite for other divisions by 0."""
    if error == 0 or norm == 0:
        return error if error == 0 or math.isnan(error) else math.inf
    return error / norm


def cosine(squares: float, inner: float, other_squares: float) -> float:
    """inner / (‖A‖ ‖B‖) from ‖A‖², ⟨A, B⟩ and ‖B‖², within [-1, 1]; NaN if one of them is zero."""
    norms = math.sqrt(max(squares, 0.0)) * math.sqrt(max(other_squares, 0.0))
    return max(-1.0, min(1.0, inner / norms)) if norms > 0 and math.isfinite(inner) else math.nan


class Sketch:
    """Z = Ω D summed over blocks of D's rows; a block's first row number seeds its rows of Ω."""

    def __init__(self, columns: int, dtype: torch.dtype):
        self.z = torch.zeros(SKETCH, columns, dtype=dtype)

    def add(self, rows: Tensor, first: int) -> None:
        generator = torch.Generator().manual_seed(first)
        omega = torch.randn(SKETCH, rows.shape[0], generator=generator, dtype=self.z.dtype)
        self.z.addmm_(omega, rows.to(self.z.dtype))

    def basis(self) -> Tensor:  # (m, min(m, 128)), orthonormal columns
        return torch.linalg.qr(self.z.T).Q


class Gram:
    """(D Q)ᵀ (D Q) summed over blocks of D's rows; without a basis, DᵀD."""

    def __init__(self, columns: int, basis: Tensor | None = None):
        self.basis = basis
        size = columns if basis is None else basis.shape[1]
        self.sum = torch.zeros(size, size, dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        if self.basis is not None:
            rows = (rows.to(self.basis.dtype) @ self.basis).double()
        self.sum.addmm_(rows.T, rows)

    def values(self) -> Tensor:  # falling, float64
        """The singular values of D Q."""
        if not bool(self.sum.isfinite().all()):
            return torch.full(self.sum.shape[:1], math.nan, dtype=torch.float64)
        return torch.linalg.eigvalsh(self.sum).clamp_min(0).sqrt().flip(0)


def singular_values(product: Product) -> Tensor:
    """The singular values of left @ right, from the triangles of two QR decompositions; NaNs if a
    value is not finite."""
    s = torch.linalg.qr(product.left, mode="r").R
    t = torch.linalg.qr(product.right.T, mode="r").R
    core = s @ t.T
    return (
        torch.linalg.svdvals(core)
        if bool(core.isfinite().all())
        else core.new_full((min(core.shape),), math.nan)
    )


def pool_spectra(spectra: Sequence[Tensor]) -> Tensor:
    """One spectrum for several matrices that share a rank: the root of their summed squares."""
    longest = max(map(len, spectra))
    return sum(
        (torch.nn.functional.pad(s.square(), (0, longest - len(s))) for s in spectra),
        torch.zeros(longest),
    ).sqrt()

"""The trailing singular triplets against LAPACK's in float64."""

import pytest
import torch
from torch import Tensor

from adapterkit.kernels.lowrank import truncated
from adapterkit.kernels.lowrank.truncated import trailing_svd

pytestmark = pytest.mark.quick


def with_values(n: int, m: int, values: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(n + m)
    orthonormal = lambda size: (
        torch.linalg.qr(torch.randn(size, len(values), generator=generator, dtype=torch.float64)).Q
    )
    return orthonormal(n) * values @ orthonormal(m).T


SPECTRA = {
    "decaying": lambda k: torch.logspace(0, -5, k, dtype=torch.float64),
    "steep": lambda k: torch.logspace(0, -12, k, dtype=torch.float64),
    "flat": lambda k: torch.ones(k, dtype=torch.float64) + torch.arange(k).flip(0) * 1e-3,
    "equal": lambda k: torch.ones(k, dtype=torch.float64),
    "singular": lambda k: (torch.arange(k).flip(0) // 4).double(),
    "nearly singular": lambda k: torch.where(torch.arange(k) < k - 2, 1.0, 1e-10).double(),
    "huge": lambda k: torch.logspace(30, 25, k, dtype=torch.float64),
    "tiny": lambda k: torch.logspace(-25, -30, k, dtype=torch.float64),
    "zero": lambda k: torch.zeros(k, dtype=torch.float64),
}
SHAPES = [(40, 40), (90, 40), (40, 90), (1, 5), (5, 1), (300, 280)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_trailing_triplets_are_accurate_and_orthonormal(shape, spectrum):
    """The values to 1e-9 of the largest and 1e-6 of themselves where float64 resolves them; the
    triplets are w's own, and orthonormal."""
    least = min(shape)
    w = with_values(*shape, SPECTRA[spectrum](least))
    size = float(torch.linalg.matrix_norm(w, 2))
    true = torch.linalg.svdvals(w)
    for rank in {1, min(4, least), least}:
        u, s, vh = trailing_svd(w, rank)
        assert u.dtype == torch.float64 and (len(s), s.isfinite().all()) == (rank, True)
        torch.testing.assert_close(s, true[-rank:], rtol=1e-6, atol=1e-14 * size * least)
        one = torch.eye(rank, dtype=torch.float64)
        torch.testing.assert_close(u.T @ u, one, atol=1e-9, rtol=0)
        torch.testing.assert_close(vh @ vh.T, one, atol=1e-9, rtol=0)
        assert float((w @ vh.T - u * s).norm()) <= 2e-6 * float(s[0]) + 1e-13 * size * least


@pytest.mark.parametrize("spectrum, inverted", [
    ("decaying", True), ("steep", True), ("singular", False), ("nearly singular", False),
    ("zero", False),
])  # fmt: skip
def test_inverts_where_that_resolves_the_values(spectrum, inverted):
    """Of nearly singular matrices the inverse hides the third value: LAPACK decomposes them."""
    triangle = torch.linalg.qr(with_values(40, 40, SPECTRA[spectrum](40))).R
    assert (truncated._inverted(triangle, 4) is not None) == inverted


def test_rank_zero_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        trailing_svd(torch.ones(3, 3), 0)

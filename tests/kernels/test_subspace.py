"""Low-rank approximations that are nearly the best: against float64's full decomposition, on noise
and on what hurts."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from adapterkit.kernels.lowrank.algebra import Svd
from adapterkit.kernels.lowrank.subspace import near_optimal_svd
from adapterkit.kernels.quant import blockwise, fp4
from adapterkit.kernels.quant import llm_int8 as int8_rows
from tests.support.usual import usual

EXCESS = 1e-4


pytestmark = [pytest.mark.quick, pytest.mark.usefixtures("one_thread")]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def lost(w: Tensor) -> Tensor:
    """What nf4 leaves of a matrix."""
    codes, absmax = blockwise.quantize_4bit(w, "nf4", 64)
    return w - blockwise.decode_4bit(codes, absmax, "nf4", 64, w.numel()).view(w.shape)


def spectrum(n: int, m: int, values: Tensor) -> Tensor:
    k = min(n, m)
    u, v = (torch.linalg.qr(normal(size, k, seed=size).double()).Q for size in (n, m))
    return (u * values.double()[:k] @ v.T).float()


def outliers(n: int, m: int) -> Tensor:
    w = normal(n, m)
    w[:, :: m // 5] *= 30
    return w


MATRICES: dict[str, Callable[[], Tensor]] = {
    "noise of nf4": lambda: lost(normal(160, 256) * 0.02),
    "noise of nf4, tall": lambda: lost(normal(384, 96) * 0.02),
    "noise of nf4, wide": lambda: lost(normal(64, 512) * 0.02),
    "noise of nf4, with structure": lambda: lost(
        spectrum(192, 256, 0.97 ** torch.arange(192)) + 0.01 * normal(192, 256)
    ),
    "noise of nf4, outliers": lambda: lost(outliers(128, 192)),
    "noise of int8": lambda: (
        (w := normal(128, 160)) - int8_rows.decode_int8(*int8_rows.quantize_int8(w))
    ),
    "noise of mxfp4": lambda: (w := normal(128, 160)) - fp4.decode_mxfp4(*fp4.encode_mxfp4(w)),
    "normal": lambda: normal(200, 200),
    "one column stands out": lambda: torch.cat([1e4 * normal(256, 1), normal(256, 255, seed=1)], 1),
    "a few columns stand out": lambda: torch.cat(
        [1e4 * normal(256, 7), normal(256, 249, seed=1)], 1
    ),
    "uniform, all above 0": lambda: torch.rand(
        120, 150, generator=torch.Generator().manual_seed(1)
    ),
    "signs": lambda: normal(120, 150).sign(),
    "decaying fast": lambda: spectrum(150, 200, 0.5 ** torch.arange(150)),
    "decaying": lambda: spectrum(150, 200, 0.9 ** torch.arange(150)),
    "decaying slowly": lambda: spectrum(200, 150, 1 / torch.arange(1, 151).double().sqrt()),
    "harmonic": lambda: spectrum(150, 200, 1 / torch.arange(1, 151).double()),
    "a cliff": lambda: spectrum(150, 200, torch.cat([torch.ones(6), torch.full((144,), 1e-3)])),
    "a late cliff": lambda: spectrum(
        150, 200, torch.cat([torch.ones(40), torch.full((110,), 1e-2)])
    ),
    "rank 3": lambda: normal(90, 3) @ normal(3, 120, seed=1),
    "equal values": lambda: spectrum(100, 140, torch.ones(100)),
    "the identity": lambda: torch.eye(100),
    "equal rows": lambda: normal(1, 130).expand(70, 130).contiguous(),
    "a few rows": lambda: torch.cat([normal(3, 150), torch.zeros(97, 150)]),
    "one element": lambda: torch.zeros(60, 80).index_put_(
        (torch.tensor(5), torch.tensor(7)), torch.tensor(2.0)
    ),
    "diagonal": lambda: torch.diag(torch.linspace(1, 2, 120)),
    "one row": lambda: normal(1, 200),
    "one column": lambda: normal(200, 1),
    "two rows": lambda: normal(2, 50),
    "three by three": lambda: normal(3, 3),
    "one by one": lambda: normal(1, 1),
    "zeros": lambda: torch.zeros(40, 60),
}


def error(w: Tensor, svd: Svd) -> float:
    return float((w.double() - (svd.u.double() * svd.s.double()) @ svd.vh.double()).norm())


def best(w: Tensor, rank: int) -> float:
    return float(torch.linalg.svdvals(w.double())[rank:].norm()) if min(w.shape) > rank else 0.0


def check(w: Tensor, rank: int, svd: Svd, excess: float = EXCESS) -> None:
    k = min(rank, *w.shape)
    assert (
        svd.u.shape == (w.shape[0], k) and svd.s.shape == (k,) and svd.vh.shape == (k, w.shape[1])
    )
    assert all(part.dtype == torch.float32 and bool(part.isfinite().all()) for part in svd)
    size = float(w.double().norm())
    room = 2e-6 * size + 1e-45 * w.numel()  # what float32 rounds, subnormals too
    assert error(w, svd) <= (1 + excess) * best(w, rank) + room, (
        error(w, svd) / size,
        best(w, rank) / size,
    )
    assert bool((svd.s >= 0).all()) and bool((svd.s.diff() <= 0).all())
    for side in (svd.u, svd.vh.T):  # orthonormal where there is something
        kept = svd.s > 1e-3 * svd.s[0]
        gram = side[:, kept].double().T @ side[:, kept].double()
        torch.testing.assert_close(
            gram, torch.eye(len(gram), dtype=torch.float64), rtol=0, atol=1e-3
        )


@pytest.mark.parametrize("rank", usual([1, 4, 16, 64, 1000], {1, 16, 1000}))
@pytest.mark.parametrize("name", MATRICES)
def test_near_the_best(name: str, rank: int) -> None:
    w = MATRICES[name]()
    svd = near_optimal_svd(w, rank)
    check(w, rank, svd)
    again = near_optimal_svd(w.clone(), rank)
    assert all(torch.equal(x, y) for x, y in zip(svd, again, strict=True))
    check(w.T.contiguous(), rank, near_optimal_svd(w.T, rank))


@pytest.mark.parametrize("scale", [1e-42, 1e-36, 1e-30, 1e-15, 1e15, 1e30, 1e36])
def test_the_svd_is_near_optimal_at_any_scale(scale: float) -> None:
    for name in ("noise of nf4", "decaying", "one row"):
        w = MATRICES[name]() * scale
        check(w, 8, near_optimal_svd(w, 8), excess=EXCESS if scale > 1e-40 else 0.02)


@pytest.mark.parametrize(
    "name", ["noise of nf4", "noise of nf4, tall", "decaying", "a cliff", "zeros", "one column"]
)
def test_a_start_changes_little_but_the_time(name: str) -> None:
    w = MATRICES[name]()
    for other in (
        w + 0.1 * w.std(correction=0) * normal(*w.shape, seed=3),
        normal(*w.shape, seed=4),
        torch.zeros(w.shape),
    ):
        first = near_optimal_svd(other, 12)
        for rank in (4, 12, 30):
            check(w, rank, near_optimal_svd(w, rank, start=first), excess=2 * EXCESS)


def test_a_looser_bound_is_cheaper_and_kept() -> None:
    w = lost(normal(256, 320))
    for excess in (1e-5, 1e-3, 1e-2):
        check(w, 16, near_optimal_svd(w, 16, excess), excess=2 * excess)


def test_the_matrix_is_left_alone_and_the_threads_do_not_matter() -> None:
    w = lost(normal(160, 256))
    before, state = w.clone(), torch.random.get_rng_state()
    first = near_optimal_svd(w, 8)
    torch.set_num_threads(2)
    with torch.inference_mode():
        second = near_optimal_svd(w, 8)
    assert torch.equal(w, before) and torch.equal(torch.random.get_rng_state(), state)
    assert math.isclose(error(w, first), error(w, second), rel_tol=1e-5)

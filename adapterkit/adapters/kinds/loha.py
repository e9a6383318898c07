"""LoHa: the elementwise product of two low-rank matrices (FedPara, arXiv:2108.06098)."""

import math
from dataclasses import dataclass
from typing import ClassVar

from adapterkit.adapters.kinds.common import (
    AdaptedModule,
    ComputedDelta,
    kernel_tail,
    no_errors,
    read_float64,
)
from adapterkit.core.adapter.config import PATTERNS
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.lazy import Tensor, torch
from adapterkit.core.records import FINITE, POSITIVE_INT
from adapterkit.core.weights.reader import TensorReader
from adapterkit.kernels.lowrank.algebra import Product

PARTS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
CORES = ("hada_t1", "hada_t2")


@dataclass(frozen=True)
class LoHa(ComputedDelta):
    """delta = alpha / r * (w1_a @ w1_b) * (w2_a @ w2_b), of rank r² at most.

    For a convolution w_a @ w_b may have a core: Σ_ij t[i, j] w_a[i] w_b[j], with the kernel's axes
    after the inputs.
    """

    # w_a (out, r), w_b (r, in); with a core w_a (r, out), w_b (r, in), t (r, r, *kernel)
    first: tuple[TensorSpec, ...]
    second: tuple[TensorSpec, ...]
    scale: float

    name = "loha"
    tier = "core"
    keys = (*PARTS, *CORES)
    shared = ()
    settings: ClassVar = {"r": POSITIVE_INT, "alpha": FINITE, **PATTERNS}
    unused_settings = frozenset({"use_effective_conv2d"})
    needs_base = ""
    check = staticmethod(no_errors)

    @staticmethod
    def from_module(adapted: AdaptedModule) -> "LoHa":
        config = adapted.adapter.config
        rank, alpha = adapted.adapter.rank_and_alpha(adapted.module, config["r"], config["alpha"])
        cored = any(name in adapted.parts for name in CORES)
        w1_a, w1_b, w2_a, w2_b, *cores = adapted.require(*PARTS, *(CORES if cored else ()))
        out = w1_a.shape[-1] if cored else w1_a.shape[0]
        tall, wide = ((rank, out) if cored else (out, rank)), (rank, w1_b.shape[-1])
        fits = (w1_a.shape, w2_a.shape, w1_b.shape, w2_b.shape) == (tall, tall, wide, wide)
        fits = fits and all(len(t.shape) == 4 and t.shape[:2] == (rank, rank) for t in cores)
        fits = fits and len({t.shape for t in cores}) < 2
        adapted.check(fits, f"two pairs of matrices of rank {rank}, as r and rank_pattern say")
        return LoHa((w1_a, w1_b, *cores[:1]), (w2_a, w2_b, *cores[1:]), alpha / rank)

    @property
    def reads(self) -> tuple[TensorSpec, ...]:
        return (*self.first, *self.second)

    @property
    def _kernel(self) -> tuple[int, ...]:
        return self.first[2].shape[2:] if len(self.first) > 2 else ()

    @property
    def shape(self) -> tuple[int, int]:
        w_a, w_b = self.first[:2]
        return w_a.shape[1 if self._kernel else 0], w_b.shape[1] * math.prod(self._kernel)

    @property
    def trailing_shape(self) -> tuple[int, ...] | None:
        return kernel_tail(self.first[1].shape[1], self._kernel)

    @property
    def rank(self) -> int:
        return self.first[1].shape[0] ** 2

    @property
    def memory(self) -> int:
        return 40 * min(math.prod(self.shape), sum(self.shape) * self.rank)

    def value(self, reader: TensorReader) -> Product | Tensor:
        """A product if the rank is low."""
        delta = hadamard(_pair(reader, self.first), _pair(reader, self.second), self.scale)
        return delta if isinstance(delta, Product) else delta.float()


def hadamard(
    first: tuple[Tensor, Tensor],  # (out, r), (r, in)
    second: tuple[Tensor, Tensor],  # (out, s), (s, in)
    scale: float,
) -> Product | Tensor:
    """scale · (A B) * (C D); if r·s is below both sides, as a product of the row-wise and the
    column-wise Khatri-Rao products, (A ∘ C) (B • D)."""
    (a, b), (c, d) = first, second
    rank = len(b) * len(d)
    if rank >= min(len(a), b.shape[1]):
        return (a @ b).mul_(c @ d) * scale
    left = torch.einsum("or,os->ors", a, c).reshape(len(a), rank) * scale
    return Product(left, torch.einsum("ri,si->rsi", b, d).reshape(rank, -1))


def _pair(reader: TensorReader, parts: tuple[TensorSpec, ...]) -> tuple[Tensor, Tensor]:
    """a (out, r), b (r, in), float64."""
    a, b, *core = read_float64(reader, *parts)
    return with_core(a, b, core[0]) if core else (a, b)


def with_core(a: Tensor, b: Tensor, core: Tensor) -> tuple[Tensor, Tensor]:
    """Σ_ij core[i, j, kernel] a[i, o] b[j, n] as factors aᵀ (out, r) and (r, in * kernel)."""
    return a.T, torch.einsum("ij...,jn->in...", core, b).reshape(len(a), -1)

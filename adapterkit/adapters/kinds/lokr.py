"""LoKr: the Kronecker product of two matrices, each full or of low rank (LyCORIS,
arXiv:2309.14859)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from adapterkit.adapters.kinds.common import AdaptedModule, kernel_tail, no_errors, read_float64
from adapterkit.adapters.kinds.loha import with_core
from adapterkit.core.adapter.config import PATTERNS
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.commands import EXTRACT
from adapterkit.core.lazy import Tensor, torch
from adapterkit.core.records import FINITE, POSITIVE_INT
from adapterkit.core.weights.reader import TensorReader
from adapterkit.kernels import dense
from adapterkit.kernels.lowrank import algebra, truncated
from adapterkit.kernels.lowrank.algebra import Product, Svd, rank_for_energy

Side = tuple[TensorSpec, ...]
SMALL = 256  # matrices with a dimension up to this are decomposed in full


@dataclass(frozen=True)
class LoKr:
    """delta = alpha / r * (w1 ⊗ w2): its singular values are the products of those of w1 and w2,
    its vectors their Kronecker products."""

    first: Side  # w1 (out1, in1), or w1_a, w1_b
    # w2 (out2, in2, *kernel), or w2_a, w2_b, or w2_a (r, out2), w2_b (r, in2), t2 (r, r, *kernel)
    second: Side
    scale: float

    name = "lokr"
    tier = "core"
    keys = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
    shared = ()
    settings: ClassVar = {"r": POSITIVE_INT, "alpha": FINITE, **PATTERNS}
    unused_settings = frozenset(
        {"use_effective_conv2d", "decompose_both", "decompose_factor", "rank_dropout_scale"}
    )
    needs_base = ""
    check = staticmethod(no_errors)

    @staticmethod
    def from_module(adapted: AdaptedModule) -> "LoKr":
        config = adapted.adapter.config
        rank, alpha = adapted.adapter.rank_and_alpha(adapted.module, config["r"], config["alpha"])
        first, second = (_side(adapted, f"lokr_w{i}", f"lokr_t{i}", rank) for i in (1, 2))
        if len(second[0].shape) == 3:
            reason = (
                "PEFT's product of a full w2 on a Conv1d is not the Kronecker product: it mixes "
                "kernel and outputs"
            )
            adapted.fail(reason, "linear layers, Conv2d, or a w2 of low rank", EXTRACT)
        adapted.check(len(first[0].shape) == 2, "w1 a matrix")
        return LoKr(first, second, alpha / rank)

    @property
    def reads(self) -> tuple[TensorSpec, ...]:
        return (*self.first, *self.second)

    @property
    def shape(self) -> tuple[int, int]:
        (out1, in1), (out2, in2) = _shape(self.first), _shape(self.second)
        return out1 * out2, in1 * in2

    @property
    def trailing_shape(self) -> tuple[int, ...] | None:
        """A full w2 of four axes is a Conv2d's; a low-rank one without core is flattened."""
        kernel = self.second[-1].shape[2:]
        if len(self.second) == 1:
            return (self.shape[1] // math.prod(kernel), *kernel)
        return kernel_tail(self.shape[1] // math.prod(kernel), kernel)

    @property
    def rank(self) -> int:
        return _rank(self.first) * _rank(self.second)

    @property
    def memory(self) -> int:
        small = math.prod(_shape(self.first)) + math.prod(_shape(self.second))
        return 40 * small + 24 * sum(self.shape) * min(self.rank, *self.shape)

    def value(self, reader: TensorReader) -> Product:
        """U s Vᵀ of all triplets."""
        svd, _ = self.leading_triplets(reader, min(self.rank, *self.shape), None)
        return Product(svd.u * svd.s, svd.vh)

    def leading_triplets(
        self, reader: TensorReader, most: int, energy: float | None
    ) -> tuple[Svd, float]:
        first, second = (list(read_float64(reader, *side)) for side in (self.first, self.second))
        return kronecker_svd(first, second, self.scale, most, energy)


def kronecker_svd(
    first: Sequence[Tensor],  # of w1 and w2: the matrix, or a and b, or those and their core
    second: Sequence[Tensor],
    scale: float,
    most: int,
    energy: float | None,
) -> tuple[Svd, float]:
    """Leading triplets of scale · (w1 ⊗ w2), and Σ s² of all: the first `most` values are products
    of the first `most` of each side."""
    (one, norm1), (two, norm2) = _svd(first, most), _svd(second, most)
    total = norm1 * norm2 * scale**2
    values = torch.outer(one.s, two.s).reshape(-1) * abs(scale)
    order = values.argsort(descending=True, stable=True)
    s = values[order[:most]]
    s = s if energy is None else s[: rank_for_energy(s, energy, total)]
    i, j = (order // max(len(two.s), 1))[: len(s)], (order % max(len(two.s), 1))[: len(s)]
    u = torch.einsum("ok,pk->opk", one.u[:, i], two.u[:, j]).reshape(-1, len(s))
    vh = torch.einsum("kn,km->knm", one.vh[i], two.vh[j]).reshape(len(s), -1)
    return Svd(u if scale >= 0 else -u, s, vh), total


def _side(adapted: AdaptedModule, full: str, core: str, rank: int) -> Side:
    if full in adapted.parts:
        others = [name for name in (f"{full}_a", f"{full}_b", core) if name in adapted.parts]
        (matrix,) = adapted.require(full)
        adapted.check(
            not others and len(matrix.shape) in (2, 3, 4), f"{full} alone, or {full}_a and {full}_b"
        )
        return (matrix,)
    a, b, *cores = adapted.require(
        f"{full}_a", f"{full}_b", *([core] if core in adapted.parts else [])
    )
    fits = (
        len(a.shape) == len(b.shape) == 2
        and b.shape[0] == rank
        and a.shape[0 if cores else 1] == rank
    )
    fits = fits and all(len(t.shape) == 4 and t.shape[:2] == (rank, rank) for t in cores)
    adapted.check(fits, f"{full}_a and {full}_b of rank {rank}, as r and rank_pattern say")
    return (a, b, *cores)


def _shape(side: Side) -> tuple[int, int]:
    """(out, in) of one side, its kernel flattened."""
    if len(side) == 1:
        return side[0].shape[0], math.prod(side[0].shape[1:])
    a, b = side[:2]
    kernel = side[2].shape[2:] if len(side) > 2 else ()
    return a.shape[1 if kernel else 0], b.shape[1] * math.prod(kernel)


def _rank(side: Side) -> int:
    return min(*_shape(side), *(side[1].shape[:1] if len(side) > 1 else ()))


def _svd(parts: Sequence[Tensor], most: int) -> tuple[Svd, float]:
    """Leading triplets of one side, float64, and Σ s² of all."""
    if len(parts) > 1:
        a, b = with_core(*parts) if len(parts) > 2 else parts
        svd = algebra.svd(Product(a, b))
        return svd, float(svd.s.square().sum())
    matrix = parts[0].reshape(len(parts[0]), -1)
    total = float(matrix.square().sum())
    if min(matrix.shape) <= SMALL:
        return Svd(*dense.svd(matrix)), total
    return truncated.truncated_svd(matrix, most), total

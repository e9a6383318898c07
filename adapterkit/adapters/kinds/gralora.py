"""GraLoRA: a block of low rank for each pair of output and input blocks (arXiv:2505.20355)."""

from dataclasses import dataclass
from typing import ClassVar

from adapterkit.adapters.kinds.common import AdaptedModule, ProductDelta, read_float64
from adapterkit.core.adapter.config import invalid_setting
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.errors import AdapterkitError
from adapterkit.core.lazy import Tensor, torch
from adapterkit.core.records import FINITE, NON_NEGATIVE_INT, POSITIVE_INT
from adapterkit.core.weights.reader import TensorReader
from adapterkit.kernels.lowrank.algebra import Product

PARTS = ("gralora_A", "gralora_B")
GENERAL = ("gralora_A_general", "gralora_B_general")


@dataclass(frozen=True)
class GraLora(ProductDelta):
    """delta[j, i] = alpha / (r + hybrid_r) * (a[i, :, j] b[j, i]ᵀ)ᵀ, and with hybrid_r b_h @ a_h.

    k = gralora_k blocks i of inputs and j of outputs; each pair has r / k of the r ranks of a's
    block i and of b's block j, so that the whole is of rank k · r.
    """

    a: TensorSpec  # (k, in / k, r)
    b: TensorSpec  # (k, r, out / k)
    general: tuple[TensorSpec, ...]  # (hybrid_r, in) and (out, hybrid_r), or none
    scale: float

    name = "gralora"
    keys = (*PARTS, *GENERAL)
    shared = ()
    settings: ClassVar = {
        "r": POSITIVE_INT,
        "alpha": FINITE,
        "gralora_k": POSITIVE_INT,
        "hybrid_r": NON_NEGATIVE_INT,
    }
    unused_settings = frozenset({"gralora_dropout"})
    needs_base = ""

    @staticmethod
    def check(config: dict, where: str) -> list[AdapterkitError]:
        if config["r"] % config["gralora_k"] == 0:
            return []
        return [invalid_setting(config, "gralora_k", f"a divisor of r, {config['r']}", where)]

    @staticmethod
    def from_module(adapted: AdaptedModule) -> "GraLora":
        config = adapted.adapter.config
        k, rank, hybrid = (config[key] for key in ("gralora_k", "r", "hybrid_r"))
        a, b, *general = adapted.require(*PARTS, *(GENERAL if hybrid else ()))
        fits = (
            len(a.shape) == len(b.shape) == 3
            and a.shape[::2] == (k, rank)
            and b.shape[:2] == (k, rank)
        )
        sides = () if not fits else ((hybrid, k * a.shape[1]), (k * b.shape[2], hybrid))
        fits = fits and tuple(one.shape for one in general) == (sides if hybrid else ())
        fits = fits and not (set(GENERAL) & set(adapted.parts) and not hybrid)
        adapted.check(fits, f"{k} blocks of rank {rank} and {hybrid} more, as the config says")
        return GraLora(a, b, tuple(general), config["alpha"] / (rank + hybrid))

    @property
    def reads(self) -> tuple[TensorSpec, ...]:
        return (self.a, self.b, *self.general)

    @property
    def shape(self) -> tuple[int, int]:
        return self.b.shape[0] * self.b.shape[2], self.a.shape[0] * self.a.shape[1]

    @property
    def trailing_shape(self) -> tuple[int, ...]:
        return self.shape[1:]

    @property
    def rank(self) -> int:
        return self.a.shape[0] * self.a.shape[2] + sum(one.shape[0] for one in self.general[:1])

    @property
    def memory(self) -> int:
        return 24 * self.rank * sum(self.shape)

    def value(self, reader: TensorReader) -> Product:
        a, b, *general = read_float64(reader, *self.reads)
        left, right = blocks(a, b)
        if general:
            left, right = torch.cat((left, general[1]), 1), torch.cat((right, general[0]))
        return Product(left * self.scale, right)


def blocks(
    a: Tensor,  # (k, in / k, r)
    b: Tensor,  # (k, r, out / k)
) -> tuple[Tensor, Tensor]:
    """(out, k · r) and (k · r, in), whose product has the blocks; zeros outside of them."""
    k, inputs, rank = a.shape
    outputs, each = b.shape[2], rank // k
    right, left = a.new_zeros(k, k, each, k, inputs), b.new_zeros(k, outputs, k, k, each)
    for block in range(k):
        right[:, block, :, block] = a[block].view(inputs, k, each).permute(1, 2, 0)
        left[block, :, block] = b[block].view(k, each, outputs).permute(2, 0, 1)
    return left.reshape(k * outputs, k * rank), right.reshape(k * rank, k * inputs)

"""AdaLoRA: a product of three matrices; training drops singular values (arXiv:2303.10512)."""

from dataclasses import dataclass
from typing import ClassVar

from adapterkit.adapters.kinds.common import AdaptedModule, ProductDelta, no_errors, read_float64
from adapterkit.core.adapter.config import KNOWN_SETTINGS, OTHER_ARITHMETIC
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.errors import Problems
from adapterkit.core.records import FINITE, FLAG, POSITIVE_INT, TEXT, list_of, optional, table_of
from adapterkit.core.weights.reader import TensorReader
from adapterkit.kernels.lowrank.algebra import Product

# settings that AdaLoRA's layers ignore (PEFT 0.21)
UNUSED = {
    "alpha_pattern", "use_rslora", "beta1", "beta2", "deltaT", "orth_reg_weight", "target_r",
    "tfinal", "tinit", "total_step",
}  # fmt: skip
UNSUPPORTED = ("use_dora", "lora_bias", "layer_replication", "target_parameters")

MASKS = optional(table_of(TEXT, list_of(FLAG, "a list of true and false")))


@dataclass(frozen=True)
class AdaLora(ProductDelta):
    """delta = scaling / (ranknum + 1e-5) * b @ (e * a).

    scaling is lora_alpha if that is above 0, else the module's rank. ranknum is the rank before
    pruning: PEFT keeps it when it drops the rows of rank_pattern.
    """

    a: TensorSpec  # (rank, in)
    b: TensorSpec  # (out, rank)
    e: TensorSpec  # (rank, 1)
    scaling: float
    ranknum: float
    stored_ranknum: TensorSpec | None = None  # in old files

    name = "adalora"
    keys = ("lora_A", "lora_B", "lora_E", "ranknum")
    shared = ()
    settings: ClassVar = {"init_r": POSITIVE_INT, "lora_alpha": FINITE, "rank_pattern": MASKS}
    unused_settings = frozenset(
        (KNOWN_SETTINGS | UNUSED) - set(OTHER_ARITHMETIC) - set(UNSUPPORTED)
    )
    needs_base = ""

    check = staticmethod(no_errors)

    @staticmethod
    def from_module(adapted: AdaptedModule) -> "AdaLora":
        config = adapted.adapter.config
        a, b, e = adapted.require("lora_A", "lora_B", "lora_E")
        mask = (config.get("rank_pattern") or {}).get(f"{adapted.module}.lora_E")
        rank = config["init_r"] if mask is None else sum(mask)
        fits = (
            len(a.shape) == len(b.shape) == 2
            and a.shape[0] == b.shape[1] == rank
            and e.shape == (rank, 1)
        )
        adapted.check(fits, f"factors of rank {rank}, as init_r and rank_pattern say")
        if not a.shape[1] or not b.shape[0]:
            errors = Problems(where=adapted.adapter.label, code="AK301")
            errors.fail(f"{a.key} {a.shape}", "matrices", "gather the shards, save again")
        alpha = config["lora_alpha"]
        return AdaLora(
            a,
            b,
            e,
            alpha if alpha > 0 else float(rank),
            float(config["init_r"]),
            adapted.parts.get("ranknum"),
        )

    @property
    def reads(self) -> tuple[TensorSpec, ...]:
        return (self.a, self.b, self.e, *([self.stored_ranknum] if self.stored_ranknum else []))

    @property
    def shape(self) -> tuple[int, int]:
        return self.b.shape[0], self.a.shape[1]

    @property
    def trailing_shape(self) -> tuple[int, ...]:
        return self.shape[1:]

    def value(self, reader: TensorReader) -> Product:
        a, b, e, *stored = read_float64(reader, *self.reads)
        ranknum = float(stored[0].reshape(())) if stored else self.ranknum
        return Product(b * (self.scaling / (ranknum + 1e-5)), e * a)

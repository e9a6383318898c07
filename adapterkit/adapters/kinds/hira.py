"""HiRA: a low-rank product, times the weight by elements (ICLR 2025, TwJrTz9cRS)."""

from dataclasses import dataclass
from typing import ClassVar

from adapterkit.adapters.kinds.common import AdaptedModule
from adapterkit.adapters.kinds.rows import RowChange, RowDelta
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.lazy import torch
from adapterkit.core.weights.parameters import StoredParameter
from adapterkit.core.weights.reader import TensorReader

FACTORS, EMBEDDING = ("hira_A", "hira_B"), ("hira_embedding_A", "hira_embedding_B")


@dataclass(frozen=True)
class Hira(RowDelta):
    """delta = W * (b @ a). PEFT rounds b @ a to the weight's dtype first; here it is not rounded.

    Several adapters add their deltas of the same W, in PEFT too. The scale is 1 for any rank."""

    a: TensorSpec  # (r, in, *kernel)
    b: TensorSpec  # (out, r, *1)
    weight: StoredParameter

    name = "hira"
    keys = (*FACTORS, *EMBEDDING)
    settings: ClassVar = {}
    unused_settings = frozenset({"r", "rank_pattern", "hira_dropout"})
    needs_base = "it multiplies the base's weights"
    merges_rows = True

    @staticmethod
    def from_module(adapted: AdaptedModule) -> "Hira":
        assert adapted.weight is not None
        embedding = any(name in adapted.parts for name in EMBEDDING)
        a, b = adapted.require(*(EMBEDDING if embedding else FACTORS))
        out, *inputs = adapted.weight.weight_shape
        fits = a.shape[1:] == tuple(inputs) and b.shape[:1] == (out,) and a.shape[0] > 0
        fits = fits and b.shape[1:] == (a.shape[0], *(1 for _ in inputs[1:]))
        adapted.check(fits, f"two factors of the base's {adapted.weight.weight_shape}")
        return Hira(a, b, adapted.weight)

    @property
    def turned(self) -> bool:
        return self.weight.transposed

    @property
    def is_linear(self) -> bool:
        return True

    def change(self, reader: TensorReader, dtype: "torch.dtype") -> RowChange:
        left, right = reader.tensor(self.b).flatten(1), reader.tensor(self.a).flatten(1)
        left, right = (right.T, left.T) if self.turned else (left, right)
        left, right = left.to(dtype), right.to(dtype)
        return lambda rows, here: (left[here] @ right).mul_(rows)

"""IA³: each output of a layer, or each input, times a number (arXiv:2205.05638)."""

from dataclasses import dataclass
from typing import ClassVar

from adapterkit.adapters.kinds.common import AdaptedModule
from adapterkit.adapters.kinds.rows import RowChange, RowDelta
from adapterkit.core.adapter.config import is_targets
from adapterkit.core.adapter.targets import WHOLE
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.commands import MERGE
from adapterkit.core.lazy import torch
from adapterkit.core.patterns import matcher
from adapterkit.core.records import test
from adapterkit.core.weights.parameters import StoredParameter
from adapterkit.core.weights.reader import TensorReader


@dataclass(frozen=True)
class Ia3(RowDelta):
    """delta = diag(l - 1) W, and (l - 1) * bias; of feedforward modules W diag(l - 1).

    A kernel's input channel has one number for all its positions."""

    scales: TensorSpec  # l: (out, 1), or (1, in) of feedforward modules; of kernels (1, n, 1, 1)
    weight: StoredParameter
    feedforward: bool

    name = "ia3"
    keys = ("ia3_l",)
    settings: ClassVar = {"feedforward_modules": test("a text, or a list of names", is_targets)}
    unused_settings = frozenset({"init_ia3_weights"})
    needs_base = "it multiplies the base's weights"
    merges_rows = True

    @staticmethod
    def from_module(adapted: AdaptedModule) -> "Ia3":
        assert adapted.weight is not None
        out, *inputs = adapted.weight.weight_shape
        (scales,) = adapted.require(*Ia3.keys)
        entries, name = adapted.adapter.config["feedforward_modules"], adapted.module
        if isinstance(entries, str):
            matches = matcher(entries, f"{adapted.adapter.where}: feedforward_modules", WHOLE)
            feedforward = matches(name)
        else:  # PEFT needs no dot before the end of a name
            feedforward = name.endswith(tuple(entries))
        shape = (1, inputs[0]) if feedforward else (out, 1)
        if len(inputs) > 1:
            shape = (1, inputs[0] if feedforward else out, *(1 for _ in inputs[1:]))
        what = "input" if feedforward else "output"
        adapted.check(scales.shape == shape, f"{shape}, a number for each {what}")
        if adapted.has_bias and not feedforward:
            adapted.fail("it scales the bias too", "no bias, for factors alone", MERGE)
        return Ia3(scales, adapted.weight, feedforward)

    @property
    def turned(self) -> bool:
        return self.weight.transposed

    @property
    def scales_bias(self) -> bool:
        return not self.feedforward

    def change(self, reader: TensorReader, dtype: "torch.dtype") -> RowChange:
        more = (reader.tensor(self.scales).double().flatten() - 1).to(dtype)
        if self.feedforward == self.turned:
            return lambda rows, here: rows * more[here, None]
        return lambda rows, here: rows * more.repeat_interleave(rows.shape[1] // len(more))

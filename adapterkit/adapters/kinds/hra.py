"""HRA: Householder reflections of the inputs of a weight (arXiv:2405.17484)."""

import math
from dataclasses import dataclass
from typing import ClassVar

from adapterkit.adapters.kinds.common import AdaptedModule
from adapterkit.adapters.kinds.rows import RowChange, RowDelta
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.errors import Unrecoverable, shown
from adapterkit.core.lazy import Tensor, torch
from adapterkit.core.records import FLAG, POSITIVE_INT
from adapterkit.core.weights.parameters import StoredParameter
from adapterkit.core.weights.reader import TensorReader
from adapterkit.kernels.lowrank.algebra import Product

DEPENDENT = 2.0**-18  # a column's rest after its projection, relative to it: float32's noise


@dataclass(frozen=True)
class Hra(RowDelta):
    """delta = W (H₁ ... Hᵣ - I), Hᵢ = I - 2 uᵢ uᵢᵀ / ‖uᵢ‖².

    With apply_GS the uᵢ are made orthogonal first. The delta is the product -(W U) (T Uᵀ) of rank
    r, with T (r, r) upper triangular and 2 on its diagonal.
    """

    reflections: TensorSpec  # u: (in, r), a kernel's axes within the inputs
    weight: StoredParameter
    orthogonal: bool
    module: str

    name = "hra"
    keys = ("hra_u",)
    settings: ClassVar = {"r": POSITIVE_INT, "apply_GS": FLAG}
    unused_settings = frozenset()
    needs_base = "it reflects the base's weights"
    merges_rows = True

    @staticmethod
    def from_module(adapted: AdaptedModule) -> "Hra":
        assert adapted.weight is not None
        config, shape = adapted.adapter.config, adapted.weight.weight_shape
        (reflections,) = adapted.require(*Hra.keys)
        expected = math.prod(shape[1:]), config["r"]
        adapted.check(reflections.shape == expected, f"{expected}, as the base and r say")
        return Hra(reflections, adapted.weight, config["apply_GS"], adapted.module)

    @property
    def rank(self) -> int:
        return min(self.reflections.shape[1], *self.shape)

    def change(self, reader: TensorReader, dtype: "torch.dtype") -> RowChange:
        left, right = (one.to(dtype) for one in self._factors(reader))
        return lambda rows, here: rows @ left @ right

    def value(self, reader: TensorReader) -> Product:
        left, right = self._factors(reader)
        return Product(self.weight.matrix(reader).double() @ left, right)

    def _factors(self, reader: TensorReader) -> tuple[Tensor, Tensor]:
        """-U (in, r) and T Uᵀ (r, in), float64."""
        u = reader.tensor(self.reflections).double()
        length = torch.linalg.vector_norm(u, dim=0)
        u, triangle = (u / length, None) if not self.orthogonal else torch.linalg.qr(u)
        rest = length if triangle is None else triangle.diagonal().abs()
        if not bool((rest > length * DEPENDENT).all()):
            what = "has columns that depend on others" if self.orthogonal else "has a zero column"
            raise Unrecoverable(
                f"{shown(self.reflections.key)} {what}",
                expected="directions, in which the weight is reflected",
                where=self.module,
                hint="the training went wrong: take an earlier checkpoint",
                code="AK208",
            )
        core = 2 * torch.eye(u.shape[1], dtype=u.dtype, device=u.device)
        for last in range(1, u.shape[1]) if triangle is None else ():
            before = u[:, :last].T @ u[:, last]
            core[:last, last].copy_(core[:last, :last] @ before).mul_(-2)
        return -u, core @ u.T

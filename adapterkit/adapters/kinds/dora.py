"""DoRA with its base: not a type, but LoRAs with deltas of the weight (arXiv:2402.09353)."""

from dataclasses import dataclass

from adapterkit.adapters.kinds.common import WeightDelta, map_rows
from adapterkit.core.adapter.factors import Factors
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.errors import Unrecoverable, shown
from adapterkit.core.lazy import Tensor
from adapterkit.core.weights.parameters import StoredParameter
from adapterkit.core.weights.reader import TensorReader
from adapterkit.kernels.rows import row_norms
from adapterkit.kernels.sums import all_finite


@dataclass(frozen=True)
class DoRA(WeightDelta):
    """delta = m * (W + s·b@a) / ‖W + s·b@a‖ - W, the norms those of output rows."""

    factors: Factors
    weight: StoredParameter

    @property
    def reads(self) -> tuple[TensorSpec, ...]:
        return (*self.factors.reads, self.magnitude, *self.weight.reads)

    @property
    def magnitude(self) -> TensorSpec:
        assert self.factors.magnitude is not None
        return self.factors.magnitude

    def value(self, reader: TensorReader) -> Tensor:  # (out, in) float32
        """(m / norm - 1) * W + m / norm * s·b@a, so that no terms of the size of W cancel."""
        (product,) = self.factors.products(reader)
        magnitude = reader.tensor(self.magnitude).double().reshape(-1)

        def change(rows: Tensor, here: slice) -> Tensor:
            added = product.left[here] @ product.right
            ratio = (magnitude[here] / row_norms(rows + added))[:, None]
            return rows.mul_(ratio - 1).add_(added.mul_(ratio))

        delta = map_rows(self.weight.matrix(reader), change)
        if not all_finite(delta):
            module = shown(self.factors.module)
            raise Unrecoverable(
                f"the delta of {module} is not finite",
                expected="no row whose norm is 0",
                where=module,
                hint="check the adapter and its base",
                code="AK208",
            )
        return delta

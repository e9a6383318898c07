"""DoRA on the base it was trained on: the weights of its modules, and the deltas that come of them."""

import math
from collections.abc import Sequence

from adapterkit import dtypes
from adapterkit.adapters.factors import Factors
from adapterkit.adapters.kinds.dora import DoRA
from adapterkit.adapters.record import Adapter, Lora
from adapterkit.checkpoint.spec import Checkpoint
from adapterkit.errors import AdapterkitError, Refused, shown
from adapterkit.weights.detect import check_not_quantized
from adapterkit.weights.names import Names
from adapterkit.weights.parameters import StoredParameter

CHECK_BASE = "check that the adapter was trained on this base"


def not_decomposed(adapter: Adapter) -> list[AdapterkitError]:
    """Why a DoRA is not a decomposition of the base's weights alone."""
    errors: list[AdapterkitError] = []
    init = adapter.changed_base()
    if init:
        found, hint = (
            f"a DoRA initialised by {init}, which changed its base",
            "merge it: adapterkit merge --base-is-residual",
        )
        errors.append(
            Refused(found, expected="a DoRA of the base as it is", where=adapter.where, hint=hint)
        )
    for key, what in [("lora_bias", "biases of b"), ("layer_replication", "replicated layers")]:
        if adapter.config.get(key):
            found = f"a DoRA with {what} ({key})"
            errors.append(
                Refused(
                    found,
                    expected="a DoRA without",
                    where=adapter.where,
                    hint="leave --base out, or merge it",
                )
            )
    return errors


class BaseWeights:
    """The base's weights of adapted modules."""

    def __init__(
        self, base: Checkpoint, adapter: Adapter, modules: Sequence[str], notes: list[str]
    ):
        check_not_quantized(base)
        self.base, self.where, self.fan_in_fan_out = (
            base,
            adapter.name,
            bool(adapter.config.get("fan_in_fan_out")),
        )
        wanted = tuple(f"{module}.weight" for module in modules)
        # a convolution may have groups: the model's classes tell
        build_model = any(
            len(base.tensors[name].shape) > 2 for name in wanted if name in base.tensors
        )
        self.names = Names(
            base, wanted, adapter.config.get("task_type"), build_model=build_model, notes=notes
        )

    def of(self, module: str, embedding: bool) -> StoredParameter:
        parameter = self.names.parameter(f"{module}.weight")
        if parameter is None or 0 in parameter.shape or len(parameter.shape) < 2:
            found = f"the base has no matrix {shown(module)}.weight"
            raise Refused(
                found,
                expected="every module of the adapter in the base",
                where=self.base.name,
                hint=CHECK_BASE,
            )
        if self.names.groups(module) > 1:
            found = f"a grouped convolution: {shown(module)} has {self.names.groups(module)} groups"
            raise Refused(
                found,
                expected="groups 1 (a LoRA cannot be put there)",
                where=self.base.name,
                hint="leave it out",
            )
        tensors = {slot.key: self.base.tensors[slot.key] for slot in parameter.slots}
        if any(spec.dtype not in dtypes.FLOATS for spec in tensors.values()):
            found = f"{shown(module)}.weight is {', '.join(sorted({spec.dtype for spec in tensors.values()}))}"
            raise Refused(
                found,
                expected=" ".join(dtypes.FLOATS),
                where=self.base.name,
                hint="dequantize it first",
            )
        return StoredParameter(
            parameter,
            tensors,
            embedding or (len(parameter.shape) == 2 and self._transposed(module, parameter.shape)),
        )

    def dora(self, lora: Lora, factors: Factors) -> DoRA:
        """A module's delta; `Refused` where its factors do not fit the base."""
        weight = self.of(lora.module, lora.kind == "embedding")
        assert lora.magnitude is not None
        shape = weight.weight_shape[0], math.prod(weight.weight_shape[1:])
        if (
            lora.depth
            or factors.experts is not None
            or factors.shape != shape
            or math.prod(lora.magnitude.shape) != shape[0]
        ):
            found = (
                f"DoRA of {shown(lora.module)} {factors.shape}, magnitudes {lora.magnitude.shape}"
            )
            raise Refused(
                found,
                expected=f"one that fits the base's {weight.weight_shape}",
                where=self.where,
                hint=CHECK_BASE,
            )
        return DoRA(lora.module, factors, lora.magnitude, weight)

    def _transposed(self, module: str, shape: tuple[int, ...]) -> bool:
        """Whether a layer's weight is stored (in, out), as GPT-2's are."""
        square, where = shape[0] == shape[1], self.base.name
        flag = self.fan_in_fan_out
        return self.names.transposed(module, fan_in_fan_out=flag, square=square, where=where)

"""DoRA on the base it was trained on: the weights of its modules, and its deltas."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from adapterkit.core import dtypes
from adapterkit.core.adapter.factors import Factors
from adapterkit.core.adapter.record import Adapter
from adapterkit.core.checkpoint.spec import Checkpoint
from adapterkit.core.commands import CHECK_BASE
from adapterkit.core.errors import AdapterkitError, Problems, Refused, shown
from adapterkit.core.records import Settings
from adapterkit.core.weights.detect import check_not_quantized
from adapterkit.core.weights.names import Names
from adapterkit.core.weights.parameters import StoredParameter

if TYPE_CHECKING:
    from adapterkit.adapters.kinds.dora import DoRA


def dora_problems(adapter: Adapter) -> list[AdapterkitError]:
    """Reasons why a DoRA's delta does not depend on its factors and the base's weights alone."""
    errors = Problems(where=adapter.where, code="AK304")
    init = adapter.changed_base()
    if init:
        errors.add(
            f"a DoRA initialized by {init}, which changed its base",
            "a DoRA of the base as it is",
            "merge it\nadapterkit merge BASE ADAPTER --base-is-residual --out merged",
        )
    for key, meaning in [("lora_bias", "biases of b"), ("layer_replication", "replicated layers")]:
        if adapter.config.get(key):
            errors.add(
                f"a DoRA with {meaning} ({key})",
                "a DoRA without",
                "remove --base, or merge the adapter",
            )
    return errors


def stored_weight(names: Names, module: str, name: str, hint: str) -> StoredParameter:
    """The stored matrix, kernel or stack of a module, in floats; `Refused` if the base has none
    that takes factors. `hint`: the fix."""
    parameter, errors = (
        names.parameter(name),
        Problems(where=names.base.name, hint=hint, code="AK401"),
    )
    if parameter is None or 0 in parameter.shape or len(parameter.shape) < 2:
        errors.add(f"the base has no matrix {shown(name)}", "a stored weight for each module")
    elif len(parameter.shape) > 2 and names.groups(module) > 1:
        problem = f"a grouped convolution: {shown(module)} has {names.groups(module)} groups"
        errors.add(problem, "groups 1 (PEFT cannot merge these either)")
    errors.raise_all()
    assert parameter is not None
    weight = StoredParameter.of(parameter, names.base.tensors)
    if not weight.dtypes <= set(dtypes.FLOATS):
        stored = ", ".join(sorted(weight.dtypes))
        errors.add(f"{shown(name)} is {stored}", " ".join(dtypes.FLOATS), "dequantize it first")
    errors.raise_all()
    return weight


def module_weight(names: Names, module: str, embedding: bool, config: Settings) -> StoredParameter:
    """A module's weight as (out, in, *kernel), by the adapter's `config`; see `stored_weight`."""
    weight = stored_weight(names, module, f"{module}.weight", CHECK_BASE)
    flag, is_square = bool(config.get("fan_in_fan_out")), weight.shape[0] == weight.shape[1]
    transposed = embedding or (
        len(weight.shape) == 2
        and names.transposed(module, fan_in_fan_out=flag, square=is_square, where=names.base.name)
    )
    return replace(weight, transposed=transposed)


class BaseWeights:
    """The base's weights of an adapter's modules."""

    def __init__(
        self, base: Checkpoint, adapter: Adapter, modules: Sequence[str], notes: list[str]
    ):
        """`Refused` for a quantized base."""
        check_not_quantized(base)
        self.base, self.adapter = base, adapter
        wanted = tuple(f"{module}.weight" for module in modules)
        # a convolution may have groups, which its class has
        build_model = any(
            len(base.tensors[name].shape) > 2 for name in wanted if name in base.tensors
        )
        self.names = Names(
            base, wanted, adapter.config.get("task_type"), build_model=build_model, notes=notes
        )

    def of(self, module: str, embedding: bool) -> StoredParameter:
        """See `module_weight`."""
        return module_weight(self.names, module, embedding, self.adapter.config)

    def fitting(self, factors: Factors, found: str, rows: int | None = None) -> StoredParameter:
        """The weight of a module; `Refused` with what was found if its factors, or `rows`
        magnitudes, do not fit it."""
        weight = self.of(factors.module, factors.kind == "embedding")
        shape = weight.weight_shape[0], math.prod(weight.weight_shape[1:])
        fits = factors.shape == shape and rows in (None, shape[0])
        if factors.depth or factors.experts is not None or not fits:
            raise Refused(
                found,
                expected=f"one that fits the base's {weight.weight_shape}",
                where=self.adapter.name,
                hint=CHECK_BASE,
                code="AK401",
            )
        return weight

    def dora(self, factors: Factors) -> "DoRA":
        """A module's delta; `Refused` if its factors do not fit the base."""
        from adapterkit.adapters.kinds.dora import DoRA

        assert factors.magnitude is not None
        magnitude = factors.magnitude.shape
        found = f"DoRA of {shown(factors.module)} {factors.shape}, magnitudes {magnitude}"
        return DoRA(factors, self.fitting(factors, found, math.prod(magnitude)))

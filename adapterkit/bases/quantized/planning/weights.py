"""The quantized weights of a model: modules, format, and the resulting config."""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from adapterkit.core import dtypes
from adapterkit.core.adapter.targets import Patterns, selecting
from adapterkit.core.checkpoint.spec import Checkpoint
from adapterkit.core.errors import AdapterkitError, Problems, Refused, shown
from adapterkit.core.options import flag_of
from adapterkit.core.outputs.model import check_gaps
from adapterkit.core.plan import Step, Task
from adapterkit.core.records import Json
from adapterkit.core.registry import members
from adapterkit.core.tasks.rows import EditedTensor
from adapterkit.core.weights.codec import PlainWeight, QuantizedModules, QuantizedWeight
from adapterkit.core.weights.layers import linear_class
from adapterkit.core.weights.names import Names
from adapterkit.core.weights.parameters import Parameter
from adapterkit.core.weights.skeleton import is_of_transformers

LINEAR = ("Linear", "Conv1D")  # classes of linear layers
OF_DIFFUSERS = ("nf4", "fp4", "int8")  # the formats that it loads
# options of some formats only
FORMAT_OPTIONS = {"double_quant": ("nf4", "fp4"), "block_size": ("nf4", "fp4", "w4a16")}

Format = type[QuantizedWeight]
Exceptions = Patterns[str]  # modules of another format than the others
NO_EXCEPTIONS = Exceptions({}, "")


def targets() -> dict[str, list[Format]]:
    """The formats that can be written, by their names in `--to`; if several share a name, the one
    for rarer modules is first."""
    formats: dict[str, list[Format]] = {}
    for record in sorted(members("codecs").values(), key=lambda record: "Linear" in record.modules):
        for target in record.targets:
            formats.setdefault(target, []).append(record)
    return formats


@dataclass(frozen=True)
class QuantizationPlan:
    """The weights of a base to quantize: its linear layers, except those that transformers'
    quantizers exclude and those that `--skip` matches."""

    base: Checkpoint
    options: Json
    exceptions: Exceptions
    format: Format | None  # None: nothing is quantized
    names: Names
    model: Any  # transformers' model, without data
    skip: Callable[[str], bool] | None
    excluded: frozenset[str]  # linear modules that transformers' quantizers exclude
    notes: list[str]
    # by key, all linear layers that are stored as such
    weights: dict[str, PlainWeight] = field(default_factory=dict)
    # module -> key of its weight, for those of them that are not tied
    linear: dict[str, str] = field(default_factory=dict)
    # module -> why its weight cannot be changed; to be refused where it is to be
    problems: dict[str, AdapterkitError] = field(default_factory=dict)
    quantized: dict[str, QuantizedWeight] = field(default_factory=dict)  # by key
    modules: dict[str, QuantizedWeight] = field(default_factory=dict)  # the same by module
    skipped: list[str] = field(default_factory=list)  # weights, by --skip or by shape
    # modules that the loader would quantize, and that are not
    unquantized: list[str] = field(default_factory=list)

    def size_notes(self) -> list[str]:
        """A note on the bytes that are not quantized, by cause; none if they are all embeddings,
        head and norms."""
        assert self.names.model is not None
        state = self.names.model.state
        stacks = [name for name, weight in state.items() if is_stack(name, weight)]
        sizes: dict[str, list[int]] = {}  # cause -> bytes of each parameter
        for name in dict.fromkeys([*stacks, *self.skipped]):
            parameter = self.names.parameter(name)
            keys = [slot.key for slot in parameter.slots] if parameter else []
            size = sum(self.base.tensors[key].nbytes for key in keys if key not in self.quantized)
            cause = "of other shapes"
            if self.skip is not None and self.skip(name.removesuffix(".weight")):
                cause = "skipped"
            elif name in stacks:
                cause = "stacks of experts (parameters, no linear layers)"
            sizes.setdefault(cause, []).append(size)
        sizes = {cause: its for cause, its in sizes.items() if sum(its)}
        if not sizes:
            return []
        total = sum(spec.nbytes for spec in self.base.tensors.values())
        rest = total - sum(self.base.tensors[key].nbytes for key in self.quantized)
        parts = [f"{sum(its) / total:.1%} in {len(its)} {cause}" for cause, its in sizes.items()]
        return [
            f"{rest / total:.1%} of the base's bytes are not quantized: {', '.join(parts)}, "
            "the rest in embeddings, the head and norms"
        ]

    def upcast_to_fp32(self) -> dict[str, Task]:
        """Tasks for weights that transformers casts to float32 when it quantizes, but not when it
        loads the result, such as T5's wo in float16; by key."""
        assert self.names.model is not None
        names: dict[str, str] = {}
        for name, parameter in self.names.model.parameters.items():
            for slot in parameter.slots:
                names.setdefault(slot.key, name)
        return {
            key: EditedTensor(key, Step(key, "F32", spec.shape, spec))
            for key, spec in self.base.tensors.items()
            if key not in self.quantized and _is_upcast(self.model, names.get(key, key), spec.dtype)
        }

    def config(self) -> Json:
        """The base's config with a quantization_config, keys sorted as transformers writes them."""
        from torch import nn

        assert self.format is not None
        to_not_convert = None
        if self.unquantized:
            to_not_convert = sorted({*self.unquantized, *excluded_modules(self.model)})
        others = [
            name
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear) and name not in self.modules
        ]
        settings = self.format.config(QuantizedModules(self.modules, to_not_convert, others))
        return dict(sorted((self.base.config | {"quantization_config": settings}).items()))


def plan_quantization(
    base: Checkpoint, options: Json, exceptions: Exceptions = NO_EXCEPTIONS
) -> QuantizationPlan:
    """The quantization of a base into the format options["to"] (None: only its linear layers are
    listed). `exceptions`: modules that get another target, of the same format.

    `Refused` with all problems of these weights."""
    to, notes = options["to"], []
    _check_options(options, exceptions)
    names = known_model(base, notes)
    assert names.model is not None
    model = names.model.model
    formats = targets().get(str(to), [])
    classes = {*LINEAR, *(name for record in formats for name in record.modules)}
    convertible = convertible_weights(model, classes)
    fitting = (record for record in formats if {*record.modules} & {*convertible.values()})
    record = next(fitting, formats[-1] if formats else None)
    _check_experts(base, to, record, names.model.state)
    if record is not None and not is_of_transformers(model) and to not in OF_DIFFUSERS:
        raise Refused(
            f"{to} of {type(model).__name__}",
            expected=f"{', '.join(OF_DIFFUSERS)}, which diffusers loads",
            where=base.name,
            hint="choose one of these",
            code="AK407",
        )
    linear = {
        f"{name}.weight": kind
        for name, module in model.named_modules()
        if (kind := linear_class(module))
    }
    excluded = frozenset(n.removesuffix(".weight") for n in linear if n not in convertible)
    skip = options.get("skip")
    if isinstance(skip, str):
        weights = {name.removesuffix(".weight") for name in (*linear, *convertible)}
        skip = selecting("--skip", skip, weights)
    plan = QuantizationPlan(base, options, exceptions, record, names, model, skip, excluded, notes)
    for name, kind in (linear | convertible).items():
        try:
            _add_weight(plan, name, kind)
        except AdapterkitError as error:
            plan.problems[name.removesuffix(".weight")] = error
    if record is not None:
        Problems(
            [error for name, error in plan.problems.items() if name not in excluded]
        ).raise_all()
        for name, module in model.named_modules():
            known = name in plan.modules or name in plan.unquantized
            if record.replaces(name, module) and not known:
                plan.unquantized.append(name)
    if not (plan.quantized if record else plan.weights):
        raise _nothing(plan, to)
    return plan


def _nothing(plan: QuantizationPlan, to: str | None) -> Refused:
    """An error: the format applies to no layer."""
    kinds = {type(plan.model.get_submodule(name)).__name__ for name in plan.excluded}
    derived = ", ".join(sorted(kinds - {*LINEAR}))
    reason = f": transformers loads no quantized {derived}" if derived else ""
    return Refused(
        f"no linear layer for {to}{reason}" if plan.format else "no linear layer",
        expected="one or more",
        where=plan.base.name,
        hint="use the model in 16 bits" if reason else "check --skip, or use another format",
        code="AK105",
    )


def known_model(base: Checkpoint, notes: list[str]) -> Names:
    """The names of a model that transformers or diffusers builds; `Refused` if neither knows it."""
    names = Names(base, build_model=True, notes=notes, of_diffusers=True)
    if names.model is None:
        reason = f": {notes[-1].splitlines()[0]}" if notes else ""
        raise Refused(
            f"a model that transformers does not know{reason}",
            expected="config.json of a known model",
            where=base.name,
            hint="update transformers",
            code="AK405",
        )
    Problems(check_gaps(base, names.model, notes)).raise_all()
    return names


def _check_options(options: Json, exceptions: Exceptions) -> None:
    used = {options["to"], *exceptions.values}
    for option, formats in FORMAT_OPTIONS.items():
        if options.get(option) and not used & set(formats):
            problem, hint = f"{flag_of(option)} with {options['to']}", f"remove {flag_of(option)}"
            raise Refused(
                problem, expected=" or ".join(formats), where="options", hint=hint, code="AK407"
            )


def _check_experts(base: Checkpoint, to: str | None, record: Format | None, state: Json) -> None:
    stack = next((name for name, weight in state.items() if is_stack(name, weight)), None)
    if record is not None and not record.allows_plain_experts and stack is not None:
        raise Refused(
            f"{to} with experts ({shown(stack)})",
            expected="a model without experts, because transformers takes all of them for "
            "quantized",
            where=base.name,
            hint="use another format",
            code="AK407",
        )


def _add_weight(plan: QuantizationPlan, name: str, kind: str) -> None:
    """Add a weight of a module of this class to the plan; `Refused` if it cannot be changed."""
    module = name.removesuffix(".weight")
    parameter = plan.names.parameter(name)
    if parameter is None or parameter.is_alias:
        return
    if plan.skip is not None and plan.skip(module):
        plan.unquantized.append(module)
        plan.skipped.append(name)
        return
    weight = _plain_weight(plan, parameter, module)
    if kind in LINEAR:
        plan.weights[weight.key] = weight
        if not parameter.tied:
            plan.linear[module] = weight.key
    if plan.format is None or kind not in plan.format.modules or module in plan.excluded:
        return
    target = plan.exceptions.value(module, plan.options["to"])
    quantized = plan.format.for_encoding(target, weight, plan.options)
    if quantized is None:
        plan.unquantized.append(module)
        plan.skipped.append(name)
    else:
        plan.quantized[weight.key] = plan.modules[module] = quantized


def _plain_weight(plan: QuantizationPlan, parameter: Parameter, module: str) -> PlainWeight:
    """The stored weight; `Refused` unless it is a single float tensor."""
    if not parameter.is_full_tensor:
        raise Refused(
            f"{shown(parameter.name)} is stored in another layout than the model's",
            expected="one stored tensor for each linear layer",
            where=plan.base.name,
            hint="exclude it with --skip, or quantize while loading, with "
            "from_pretrained(quantization_config=...)"
            if plan.format
            else "exclude it with --targets",
            code="AK404",
        )
    spec = plan.base.tensors[parameter.slots[0].key]
    if spec.dtype not in dtypes.FLOATS:
        raise Refused(
            f"{shown(spec.key)} is {spec.dtype}",
            expected="a float",
            where=plan.base.name,
            hint="dequantize it first",
            code="AK404",
        )
    transposed = plan.names.transposed(module)
    shape = (spec.shape[1], spec.shape[0]) if transposed else spec.shape
    upcast = _is_upcast(plan.model, parameter.name, spec.dtype)
    return PlainWeight(spec.key, shape, spec.dtype, transposed, upcast)


def _is_upcast(model: object, name: str, dtype: str) -> bool:
    """Return whether transformers converts a parameter of this dtype to float32 (its
    `_get_dtype_plan`)."""
    strict = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    patterns = {
        "F16": {*(getattr(model, "_keep_in_fp32_modules", None) or ()), *strict},
        "BF16": set(strict),
    }
    return any(re.search(text.replace("*", ".*"), name) for text in patterns.get(dtype, ()))


def convertible_weights(model: Any, classes: Collection[str]) -> dict[str, str]:
    """Weights of modules of these classes (not subclasses), with the class, except those that
    transformers' quantizers exclude. A linear layer has one weight; in other classes every
    parameter with three axes counts."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    excluded, weights = excluded_modules(model), {}
    for name, module in model.named_modules():
        kind = type(module).__name__
        if kind not in classes or not should_convert_module(name, excluded):
            continue
        if kind in LINEAR:
            weights[f"{name}.weight"] = kind
            continue
        for leaf, weight in module.named_parameters(recurse=False):
            if weight.dim() == 3:
                weights[f"{name}.{leaf}"] = kind
    return weights


def is_stack(name: str, weight: Any) -> bool:
    """Return whether a parameter contains the weights of several experts."""
    return weight.dim() == 3 and "experts" in name


def excluded_modules(model: object) -> list[str]:
    """The modules that transformers' quantizers exclude by default: the output layer, tied ones,
    the last one; diffusers' quantizers exclude none of these."""
    from transformers.quantizers.base import get_keys_to_not_convert

    in_fp32 = getattr(model, "_keep_in_fp32_modules", None) or ()
    if not is_of_transformers(model):
        return sorted(in_fp32)
    return sorted({*get_keys_to_not_convert(model), *in_fp32})

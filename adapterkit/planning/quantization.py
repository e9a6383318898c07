"""Which modules of a model are quantized, in which format, and the config that says so."""

import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

from adapterkit import dtypes
from adapterkit.checkpoint.spec import Checkpoint
from adapterkit.errors import AdapterkitError, Refused, refuse_all, shown
from adapterkit.patterns import matcher, similar_names
from adapterkit.plan import Step, Task
from adapterkit.registry import members
from adapterkit.tasks.edited import EditedTensor
from adapterkit.weights.codec import PlainWeight, QuantizedModules, QuantizedWeight
from adapterkit.weights.names import Names


def targets() -> dict[str, list[type[QuantizedWeight]]]:
    """What can be written, by the name that `--to` gives it; of formats of one name the one for rarer modules first."""
    found: dict[str, list[type[QuantizedWeight]]] = {}
    for record in sorted(
        members("weights.codecs").values(), key=lambda record: "Linear" in record.modules
    ):
        for target in record.targets:
            found.setdefault(target, []).append(record)
    return found


class QuantizationPlan:
    """Which weights of a base are quantized, and how: the linear layers, but for what transformers leaves alone, and `skip`.

    `exceptions`: modules (by a predicate) that get another target than options["to"], of the same format.
    """

    def __init__(
        self,
        base: Checkpoint,
        options: dict[str, Any],
        exceptions: Sequence[tuple[Callable[[str], bool], str]] = (),
    ):
        to, known = options["to"], targets()
        for option, fitting in (
            ("double_quant", ("nf4", "fp4")),
            ("block_size", ("nf4", "fp4", "w4a16")),
        ):
            if options.get(option) and not {to, *(target for _, target in exceptions)} & set(
                fitting
            ):
                found, expected = f"--{option.replace('_', '-')} with {to}", " or ".join(fitting)
                raise Refused(found, expected=expected, where="options", hint="leave it out")
        self.base, self.options, self.exceptions = base, options, exceptions
        self.notes: list[str] = []
        self.weights: dict[
            str, PlainWeight
        ] = {}  # by key, all linear layers that are stored as such
        self.linear: dict[
            str, str
        ] = {}  # module -> key of its weight: those of them that are not tied
        self.problems: dict[
            str, AdapterkitError
        ] = {}  # by module, why its weight cannot be changed; refused if it is to be
        self.kept: list[str] = []  # linear modules that transformers' quantizers leave alone
        self.packed: dict[str, QuantizedWeight] = {}  # by key, those that are quantized
        self.modules: dict[str, QuantizedWeight] = {}  # the same by module
        self.left: list[str] = []
        self.names = Names(base, build_model=True, notes=self.notes)
        skeleton = self.names.model
        if skeleton is None:
            found = f"a model that transformers does not know{': ' + self.notes[-1] if self.notes else ''}"
            raise Refused(
                found,
                expected="config.json of a known model",
                where=base.name,
                hint="update transformers",
            )
        self.skeleton, self.model = skeleton, skeleton.model
        records = known.get(str(to), [])
        found = layers(
            self.model,
            {"Linear", "Conv1D", *(name for record in records for name in record.modules)},
        )
        self.record = next(
            (r for r in records if {*r.modules} & {*found.values()}),
            records[-1] if records else None,
        )
        stack = next(
            (name for name, weight in skeleton.state.items() if is_stack(name, weight)), None
        )
        if self.record is not None and not self.record.allows_plain_experts and stack is not None:
            expected = (
                "a model without: transformers takes all experts of such a checkpoint for quantized"
            )
            raise Refused(
                f"{to} with experts ({shown(stack)})",
                expected=expected,
                where=base.name,
                hint="use another format",
            )
        self.skip = matcher(options["skip"], "--skip") if options.get("skip") else None
        modules = [name for name, _ in self.model.named_modules()]
        if self.skip is not None and not any(map(self.skip, modules)):
            raise Refused(
                f"--skip {options['skip']!r} matches none",
                expected="a module of the model",
                where="--skip",
                hint=similar_names(options["skip"], modules) or "check the regex",
            )
        self.asked: list[str] = []  # what the loader would quantize, and is not
        others = {
            f"{name}.weight": type(module).__name__
            for name, module in self.model.named_modules()
            if is_linear(module)
        }
        self.kept = [name.removesuffix(".weight") for name in others if name not in found]
        for name, kind in (others | found).items():
            try:
                self._choose(name, kind)
            except AdapterkitError as error:
                self.problems[name.removesuffix(".weight")] = error
        if self.record is not None:
            refuse_all(
                [error for module, error in self.problems.items() if module not in self.kept]
            )
            replaced = (
                name
                for name, module in self.model.named_modules()
                if self.record.replaces(name, module)
            )
            self.asked += [
                name for name in replaced if name not in self.modules and name not in self.asked
            ]
        if not (self.packed if self.record else self.weights):
            text = f"no linear layer for {to}" if self.record else "no linear layer"
            raise Refused(
                text,
                expected="one or more",
                where=base.name,
                hint="check --skip, or use another format",
            )

    def _choose(self, name: str, kind: str) -> None:
        module = name.removesuffix(".weight")
        parameter = self.names.parameter(name)
        if parameter is None or parameter.is_alias:
            return
        if self.skip is not None and self.skip(module):
            self.asked.append(module)
            self.left.append(name)
            return
        if not parameter.whole:
            found = f"{shown(name)} is stored in another layout than the model's"
            hint = "leave it out with --skip, or quantize while loading, with from_pretrained(quantization_config=...)"
            hint = hint if self.record else "leave it out with --targets"
            raise Refused(
                found,
                expected="one stored tensor for each linear layer",
                where=self.base.name,
                hint=hint,
            )
        spec = self.base.tensors[parameter.slots[0].key]
        if spec.dtype not in dtypes.FLOATS:
            raise Refused(
                f"{shown(spec.key)} is {spec.dtype}",
                expected="a float",
                where=self.base.name,
                hint="dequantize it first",
            )
        transposed = self.names.transposed(module)
        shape = (spec.shape[1], spec.shape[0]) if transposed else spec.shape
        weight = PlainWeight(spec.key, shape, spec.dtype, transposed, self._wide(name, spec.dtype))
        if kind in ("Linear", "Conv1D"):
            self.weights[spec.key] = weight
            if not parameter.tied:
                self.linear[module] = spec.key
        if self.record is None or kind not in self.record.modules or module in self.kept:
            return
        target = next(
            (target for fits, target in self.exceptions if fits(module)), self.options["to"]
        )
        packed = self.record.for_encoding(target, weight, self.options)
        if packed is None:
            self.asked.append(module)
            self.left.append(name)
        else:
            self.packed[spec.key] = self.modules[module] = packed

    def unquantized(self) -> list[str]:
        """A note on what stays as it is, by bytes, and why; none where that is embeddings, the head and norms alone."""
        stacks = [name for name, weight in self.skeleton.state.items() if is_stack(name, weight)]
        found: dict[str, list[int]] = {}  # why -> bytes of each parameter
        for name in dict.fromkeys([*stacks, *self.left]):
            parameter = self.names.parameter(name)
            size = (
                sum(
                    self.base.tensors[s.key].nbytes
                    for s in parameter.slots
                    if s.key not in self.packed
                )
                if parameter
                else 0
            )
            skipped = self.skip is not None and self.skip(name.removesuffix(".weight"))
            why = (
                "skipped"
                if skipped
                else "stacks of experts (parameters, no linear layers)"
                if name in stacks
                else "of other shapes"
            )
            found.setdefault(why, []).append(size)
        found = {why: sizes for why, sizes in found.items() if sum(sizes)}
        if not found:
            return []
        total = sum(spec.nbytes for spec in self.base.tensors.values())
        rest = total - sum(self.base.tensors[key].nbytes for key in self.packed)
        parts = [f"{sum(sizes) / total:.1%} in {len(sizes)} {why}" for why, sizes in found.items()]
        said = f"{rest / total:.1%} of the base's bytes are not quantized: {', '.join(parts)}"
        return [f"{said}, the rest in embeddings, the head and norms"]

    def widened(self) -> dict[str, Task]:
        """What transformers makes float32 when it quantizes, but not when it loads the result, such as T5's wo in float16."""
        names: dict[str, str] = {}
        for name, parameter in self.skeleton.parameters.items():
            for slot in parameter.slots:
                names.setdefault(slot.key, name)
        return {
            key: EditedTensor(key, Step(key, "F32", spec.shape, spec))
            for key, spec in self.base.tensors.items()
            if key not in self.packed and self._wide(names.get(key, key), spec.dtype)
        }

    def _wide(self, name: str, dtype: str) -> bool:
        """Whether transformers makes a parameter of this dtype float32 (its `_get_dtype_plan`)."""
        strict = getattr(self.model, "_keep_in_fp32_modules_strict", None) or ()
        parts = {
            "F16": {*(getattr(self.model, "_keep_in_fp32_modules", None) or ()), *strict},
            "BF16": set(strict),
        }
        return any(re.search(part.replace("*", ".*"), name) for part in parts.get(dtype, ()))

    def config(self) -> dict[str, Any]:
        """The base's config with a quantization_config, keys sorted as transformers writes them."""
        skipped = sorted({*self.asked, *kept_modules(self.model)}) if self.asked else None
        from torch import nn

        linear = (
            name for name, module in self.model.named_modules() if isinstance(module, nn.Linear)
        )
        others = [name for name in linear if name not in self.modules]
        assert self.record is not None
        said = self.record.config(QuantizedModules(self.modules, skipped, others))
        return dict(sorted((self.base.config | {"quantization_config": said}).items()))


def layers(model: Any, classes: Collection[str]) -> dict[str, str]:
    """Weights of modules of these classes, with the class, but for what transformers' quantizers leave alone. Linear layers and
    Conv1D have one, of others all parameters of three axes are."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    kept, found = kept_modules(model), {}
    for name, module in model.named_modules():
        kind = type(module).__name__
        if kind not in classes or not should_convert_module(name, kept):
            continue
        if is_linear(module):
            found[f"{name}.weight"] = kind
        else:
            found |= {
                f"{name}.{leaf}": kind
                for leaf, weight in module.named_parameters(recurse=False)
                if weight.dim() == 3
            }
    return found


def is_stack(name: str, weight: Any) -> bool:
    """Whether a parameter is the weights of several experts."""
    return weight.dim() == 3 and "experts" in name


def is_linear(module: Any) -> bool:
    """Whether it is a Linear itself, no subclass, or GPT-2's Conv1D."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return type(module) is nn.Linear or isinstance(module, Conv1D)


def kept_modules(model: Any) -> list[str]:
    """What transformers' quantizers leave alone by themselves: the output layer, what is tied, the last module."""
    from transformers.quantizers.base import get_keys_to_not_convert

    return sorted(
        {*get_keys_to_not_convert(model), *(getattr(model, "_keep_in_fp32_modules", None) or ())}
    )

"""Build models of transformers on the meta device, without data, and map each of their parameters
to stored tensors."""

import json
import logging
import re
import tempfile
from copy import deepcopy
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.core.checkpoint.spec import Checkpoint
from adapterkit.core.errors import AdapterkitError, Refused, shown
from adapterkit.core.lazy import optional
from adapterkit.core.weights.parameters import Parameter, Slot, extent, identity_slot, known_slots
from adapterkit.core.weights.safe_config import LOCAL, closed, safe_config

if TYPE_CHECKING:
    from torch import nn

    from adapterkit.core.weights.symbols import Symbol

Source = tuple[str, str, tuple[int, ...]]  # a key, the converter's pattern that it matches, shape
OF_DIFFUSERS = "_class_name"  # key of the class in its configs
MODELS = 2  # cached models: both sides of an extraction, a base that is read twice


class Skeleton:
    """A model of transformers on the meta device, and the slots of each of its parameters."""

    def __init__(self, base: Checkpoint, class_name: str):
        self.base, self.class_name = base, class_name
        self.model = _meta_model(base, class_name)
        self.state = self.model.state_dict()  # names and shapes of all parameters, stored or not
        self.tied = tied_names(self.model)
        self.renamings, self.converters = _conversions(self.model)
        # slots of single experts' matrices, by stack and pattern
        self._experts: dict[tuple[str, str], dict[str, Slot]] = {}
        # parameters whose conversion does more than move elements, or fails
        self.unreadable: dict[str, AdapterkitError] = {}
        self.unused: list[str] = []  # keys that the loader ignores
        self.parameters = self._find_parameters()

    def with_config(self, config: dict) -> tuple[Any, dict[str, tuple[str, ...]]]:
        """The same class without data, built with another config, and its `tied_names`."""
        model = _meta_model(replace(self.base, config=config), self.class_name)
        return model, tied_names(model)

    def by_old_name(self, name: str) -> Parameter | None:
        """The parameter that a name from a file or an older transformers means, or None.

        The loader's renames determine it; one expert's matrix of a stack is a stack of one."""
        new, pattern = self.loaded_as(name)
        if new == name or new not in self.parameters:
            return None
        return self.parameters[new] if pattern is None else self._expert(name, new, pattern)

    def loaded_as(self, key: str) -> tuple[str, str | None]:
        """The parameter that the loader puts a key into, and the converter's pattern that it
        matches."""
        from transformers.core_model_loading import rename_source_key

        prefix = self.model.base_model_prefix
        return rename_source_key(key, self.renamings, self.converters, prefix, self.state)

    def _expert(self, name: str, stack_name: str, pattern: str) -> Parameter | None:
        """The matrix `name` (for example of experts.3.up_proj) in the stack that the loader would
        put it into."""
        from adapterkit.core.weights.symbols import narrowed

        stack = self.parameters[stack_name]
        number = re.search(pattern.replace("*", r"(\d+)"), name)
        if len(stack.shape) != 3 or number is None:
            return None
        key = (stack_name, name.replace(number[0], "*"))
        if key not in self._experts:
            self._experts[key] = self._expert_slots(name, number[0], stack_name, pattern)
        expert = self._experts[key].get(name)
        if expert is None:
            return None
        piece = narrowed(stack.shape, stack.slots, [(axis.at, axis.stop) for axis in expert.axes])
        return Parameter(name, tuple(piece.shape), piece.slots)

    def _expert_slots(
        self, name: str, number: str, stack_name: str, pattern: str
    ) -> dict[str, Slot]:
        """The slots of each expert's matrices in a stack, by names like `name` with another
        `number`."""
        stack = self.parameters[stack_name]
        converter = next(c for c in self.converters if pattern in c.source_patterns)
        shape = (stack.shape[1] // len(converter.source_patterns), stack.shape[2])
        sources: list[Source] = []
        for other in converter.source_patterns:
            for expert in range(stack.shape[0]):
                text = other.replace("*", str(expert)).replace("\\", "")
                sources.append((name.replace(number, text), other, shape))
        symbol = self._converted(stack_name, converter, sources)[stack_name]
        if tuple(symbol.shape) != stack.shape:
            return {}
        return {slot.key: slot for slot in symbol.slots}

    def renamed(self, key: str) -> str:
        """The parameter that the loader puts a stored tensor of that name into."""
        return self.loaded_as(key)[0]

    def module(self, name: str) -> "nn.Module | None":
        """A module of the model, or None."""
        try:
            return self.model.get_submodule(name)
        except AttributeError:
            return None

    def _find_parameters(self) -> dict[str, Parameter]:
        slots, tied = self._slots(self.state), self.tied
        own = known_slots(self.base)
        parameters: dict[str, Parameter] = {}
        for name, value in self.state.items():
            others = tied.get(name, ())
            source = next((each for each in (name, *others) if each in slots), None)
            if source is not None:
                shape = extent(slots[source]) if source in own else tuple(value.shape)
                shape = _stored_shape(shape, slots[source])
                parameters[name] = Parameter(name, shape, slots[source], others, source != name)
        return parameters

    def _slots(self, state: dict) -> dict[str, tuple[Slot, ...]]:
        """Slots of every parameter, by running the loader's renames and conversions on symbols."""
        from transformers.core_model_loading import dot_natural_key, rename_source_key

        by_pattern = {pattern: c for c in self.converters for pattern in c.source_patterns}
        slots: dict[str, tuple[Slot, ...]] = {}
        pending: dict[str, list[Source]] = {}  # by a converter's first target
        keys = [key for key in self.base.tensors if key.isascii()]  # others are no parameter's
        self.unused += self.base.tensors.keys() - keys
        for key in sorted(keys, key=dot_natural_key):
            name, pattern = self.loaded_as(key)
            if name not in state and key in state:
                prefix = self.model.base_model_prefix
                name, pattern = rename_source_key(key, [], [], prefix, state)
            if name not in state:
                self.unused.append(key)  # copied unchanged
                continue
            shape = self.base.tensors[key].shape
            if pattern is None:
                slots[name] = (identity_slot(key, shape),)
            else:
                pending.setdefault(name, []).append((key, pattern, shape))
        known: dict[tuple, tuple[str, list[Source], dict[str, tuple[Slot, ...]]]] = {}
        for first, sources in pending.items():
            converter = by_pattern[sources[0][1]]
            shapes = tuple((pattern, shape) for _, pattern, shape in sources)
            kind = (id(converter), self._signature(first, converter), shapes)
            try:
                converted = _renumbered(first, sources, *known[kind]) if kind in known else None
                if converted is None:
                    symbols = self._converted(first, converter, sources)
                    converted = {name: symbol.slots for name, symbol in symbols.items()}
                    known.setdefault(kind, (first, sources, converted))
            except AdapterkitError as error:
                self.unreadable |= dict.fromkeys(_targets(first, converter), error)
                continue
            slots |= {name: found for name, found in converted.items() if name in state}
        own = known_slots(self.base)
        return slots | {name: found for name, found in own.items() if name in state}

    def _signature(self, name: str, converter) -> tuple:
        """The properties that a conversion may depend on: its target's name without numbers, and
        all targets' shapes."""
        shapes = tuple(
            tuple(self.state[target].shape) if target in self.state else None
            for target in _targets(name, converter)
        )
        return tuple("#" if part.isdigit() else part for part in name.split(".")), shapes

    def _converted(self, name: str, converter, sources: list[Source]) -> "dict[str, Symbol]":
        """The parameters that a converter makes from stored tensors, by running its operations on
        symbols."""
        from adapterkit.core.weights.symbols import Symbol

        converter = deepcopy(converter)
        for key, pattern, shape in sources:
            converter.add_tensor(name, key, pattern, Symbol.of(key, shape))
        try:
            symbols = converter.convert(name, model=self.model, config=self.model.config)
        except Exception as error:  # also transformers' own, if a source is missing or misshapen
            operations = ", ".join(type(op).__name__ for op in converter.operations)
            problem = error.problem if isinstance(error, AdapterkitError) else shown(error)
            raise Refused(
                f"{shown(name)} is stored through {operations}: {problem}",
                expected="conversions that move elements along axes",
                where=self.base.name,
                hint="save the model once with transformers (from_pretrained, save_pretrained) and "
                "use that as the base",
                code="AK405",
            ) from error
        return {
            key: symbol[0] if isinstance(symbol, list) else symbol
            for key, symbol in symbols.items()
        }


def _targets(name: str, converter) -> list[str]:
    """The parameters that a converter makes, by the first one's name."""
    first, *others = converter.target_patterns
    return [name, *(name.replace(first, other) for other in others)]


def _renumbered(
    name: str,
    sources: list[Source],
    other: str,
    others: list[Source],
    converted: dict[str, tuple[Slot, ...]],
) -> dict[str, tuple[Slot, ...]] | None:
    """The result of `other`'s conversion for a name with other numbers (another layer); None if the
    names do not determine it."""
    own_parts, other_parts = name.split("."), other.split(".")
    keys = {there: here for (here, _, _), (there, _, _) in zip(sources, others, strict=True)}
    result = {}
    for key, slots in converted.items():
        parts = key.split(".")
        if len(parts) != len(other_parts):
            return None
        for i, (here, there) in enumerate(zip(own_parts, other_parts, strict=True)):
            if here != there:
                if parts[i] != there:
                    return None
                parts[i] = here
        moved = tuple(Slot(keys[slot.key], slot.shape, slot.axes) for slot in slots)
        result[".".join(parts)] = moved
    return result


def tied_names(model) -> dict[str, tuple[str, ...]]:
    """Names that share one parameter, each with the others of its group."""
    groups: dict[str, set[str]] = {}
    for a, b in dict(getattr(model, "all_tied_weights_keys", None) or {}).items():
        group = groups.get(a, {a}) | groups.get(b, {b})
        for name in group:
            groups[name] = group
    return {name: tuple(sorted(group - {name})) for name, group in groups.items()}


def _conversions(model) -> tuple[list, list]:
    """The loader's renames and conversions for a model, in its order; diffusers' has none."""
    if not is_of_transformers(model):
        return [], []
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    mapping = get_model_conversion_mapping(model)
    renamings = [t for t in mapping if isinstance(t, WeightRenaming)]
    return renamings, [t for t in mapping if isinstance(t, WeightConverter)]


def _stored_shape(shape: tuple[int, ...], slots: tuple[Slot, ...]) -> tuple[int, ...]:
    """The parameter's true shape, because a checkpoint may have another vocabulary size than the
    config."""
    if len(slots) == 1 and slots[0].is_full_tensor:
        return tuple(len(axis.of) for axis in slots[0].axes)
    return shape


def _meta_model(base: Checkpoint, class_name: str) -> Any:
    """A model without data from a base's config, without keys that lead to code; do not change
    it."""
    config = safe_config(base.config)
    if class_name == config.get(OF_DIFFUSERS):
        return _built_by_diffusers(class_name, json.dumps(config), base.name)
    return _built(class_name, json.dumps(config), base.name)


def is_of_transformers(model: object) -> bool:
    from transformers import PreTrainedModel

    return isinstance(model, PreTrainedModel)


@lru_cache(MODELS)
def _built_by_diffusers(class_name: str, config_json: str, where: str) -> Any:
    """A model of diffusers, with attributes that only transformers' models have; `Refused` if
    diffusers cannot build it."""
    import torch

    diffusers: Any = optional(
        "diffusers", install="diffusers", expected="diffusers, which knows the model", where=where
    )
    cls = getattr(diffusers, class_name, None) if class_name.isidentifier() else None
    if not (isinstance(cls, type) and issubclass(cls, diffusers.ModelMixin)):
        version = diffusers.__version__
        raise Refused(
            f"{shown(class_name)} is no model of diffusers {version}", where=where, code="AK405"
        )
    config = {k: v for k, v in json.loads(config_json).items() if k != "quantization_config"}
    try:
        with torch.device("meta"), closed():
            model = cls.from_config(config)
    except Exception as error:  # any model's code may fail on a config it does not like
        raise Refused(
            f"diffusers cannot build {shown(class_name)}: {shown(error)}",
            where=where,
            hint="update diffusers",
            code="AK405",
        ) from error
    more = {"base_model_prefix": "", "base_model": model, "_keys_to_ignore_on_load_missing": None}
    for name, value in more.items():
        object.__setattr__(model, name, value)  # not a submodule
    return model


@lru_cache(MODELS)
def _built(class_name: str, config_json: str, where: str) -> Any:
    """A model by its class and its config; `Refused` if transformers cannot build it."""
    import torch
    import transformers
    from transformers.utils import logging as transformers_logging

    auto = class_name.startswith("AutoModel")
    if not re.fullmatch(r"[a-z]*[A-Z]\w*", class_name):  # the name of a module would import it
        raise Refused(f"{shown(class_name)} is no class's name", where=where, code="AK405")
    config = _config(config_json, where)
    cls: Any = getattr(transformers, class_name, None)
    known = isinstance(cls, type) and (auto or issubclass(cls, transformers.PreTrainedModel))
    if not known:  # the file is untrusted
        version = transformers.__version__
        raise Refused(
            f"{shown(class_name)} is no model of transformers {version}", where=where, code="AK405"
        )
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)
    try:
        with torch.device("meta"), closed():
            model = getattr(cls, "from_config", cls)(config) if auto else cls(config)
    except Exception as error:  # any model's code may fail on a config it does not like
        raise Refused(
            f"transformers cannot build {shown(class_name)}: {shown(error)}",
            where=where,
            hint="update transformers",
            code="AK405",
        ) from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    if not isinstance(model, transformers.PreTrainedModel):
        raise Refused(f"{shown(class_name)} is no model", where=where, code="AK405")
    return model


def _config(config_json: str, where: str) -> Any:
    """transformers' config object."""
    from transformers import AutoConfig

    named: list[object] = []  # at any depth; transformers would look it up on the Hub
    hook = lambda part: named.append(part.get("backbone")) or part
    config = json.loads(config_json, object_hook=hook)
    if backbones := [name for name in named if isinstance(name, str)]:
        raise Refused(
            f"the config names a backbone, {shown(backbones[0])}",
            expected="a model without another one inside",
            where=f"{where}/config.json",
            hint="names that equal the stored keys work without it",
            code="AK405",
        )
    try:
        with tempfile.TemporaryDirectory() as folder, closed():
            Path(folder, "config.json").write_text(config_json, encoding="utf-8")
            return AutoConfig.from_pretrained(folder, **LOCAL)
    except Exception as error:  # an unknown type, or values that its class refuses
        kind = shown(config.get("model_type"))
        raise Refused(
            f"transformers cannot read the config of model_type {kind!r}: {shown(error)}",
            where=f"{where}/config.json",
            hint="update transformers; names that equal the stored keys work without it",
            code="AK405",
        ) from error

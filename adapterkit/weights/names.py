"""Parameters of the loaded model and the stored tensors that hold them.

An adapter names modules of the loaded model; a checkpoint's keys can differ (renames, experts stored one by one, fused
projections). Most often they are the same, and then nothing is imported. Where they may not be, the model is built on the meta
device, without data, and transformers' own conversion tables say which stored tensors make which parameter.
"""

import importlib.util
import json
import re
import tempfile
from collections.abc import Collection
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from adapterkit.checkpoint.spec import Checkpoint
from adapterkit.errors import AdapterkitError, Refused, shown
from adapterkit.weights.slots import Axis, Slot, Symbol, identity_slot

HEADS = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoModel",
}
Source = tuple[
    str, str, tuple[int, ...]
]  # a stored key, the converter's pattern that it matches, its shape


@dataclass(frozen=True)
class Parameter:
    """One parameter of the loaded model: its shape, where it is stored, and which other names share it."""

    name: str
    shape: tuple[int, ...]
    slots: tuple[Slot, ...]
    tied: tuple[str, ...] = ()  # other parameters of the model that are this one
    is_alias: bool = False  # the file holds it under the name of one of those only

    @property
    def whole(self) -> bool:
        """Whether one stored tensor is the parameter, in its own order, and nothing else."""
        return len(self.slots) == 1 and self.slots[0].whole


def plain_names(config: dict) -> bool:
    """Whether transformers' sources prove that this model's keys are its parameters' names and no layer is transposed.

    Two files are read as text, not imported: the conversion tables, which would have to name the model type or the
    architecture, and the model's own code, which would have to name `Conv1D` (GPT-2's transposed linear layer).
    """
    types = set(_model_types(config))
    home = _transformers_home()
    if not types or home is None:
        return False
    table = home / "conversion_mapping.py"
    text = table.read_text() if table.exists() else ""
    names = types | set(map(str, config.get("architectures") or ()))
    if not text or any(f'"{name}"' in text for name in names):
        return False
    for kind in types:
        code = sorted((home / "models" / kind.replace("-", "_")).glob("modeling_*.py"))
        if not code or any("Conv1D" in file.read_text() for file in code):
            return False
    return True


def _transformers_home() -> Path | None:
    found = importlib.util.find_spec("transformers")  # does not import it
    return Path(found.origin).parent if found and found.origin else None


def _model_types(config: dict) -> list[str]:
    found = [config["model_type"]] if isinstance(config.get("model_type"), str) else []
    for value in config.values():
        if isinstance(value, dict) and "model_type" in value:
            found += _model_types(value)
    return found


@dataclass
class Names:
    """Looks up the parameters of the model that a checkpoint is loaded as.

    `wanted` are the parameters that an adapter speaks of and `task` what it was trained for: together they tell which class of
    the architecture's family the adapter's names belong to (a base saved without a head is often trained with one).
    """

    base: Checkpoint
    wanted: tuple[str, ...] = ()
    task: str | None = None
    trained_class: str | None = (
        None  # auto_mapping's class name, looked up in transformers and nowhere else
    )
    build_model: bool = (
        False  # build the model even if all names match directly: ties and orientations matter
    )
    notes: list[str] = field(default_factory=list)

    @cached_property
    def plain(self) -> bool:
        """Whether transformers' sources prove that keys are names and no layer is transposed."""
        return plain_names(self.base.config)

    @cached_property
    def model(self) -> "Skeleton | None":
        """The model without data, or None where direct names are proof enough or transformers does not know it."""
        keys = self.base.tensors
        direct = all(name in keys for name in self.wanted)
        if direct and not self.build_model and self.plain:
            return None
        return self._skeleton()

    def _skeleton(self) -> "Skeleton | None":
        config = self.base.config
        if not config.get("model_type"):
            return None
        best, problem = None, None
        for class_name in self._candidates():
            try:
                model = Skeleton(self.base, class_name)
            except AdapterkitError as error:
                problem = problem or error
                continue
            known = sum(name in model.state for name in self.wanted)
            if best is None or known > best[0]:
                best = (known, model)
            if known == len(self.wanted):
                break
        if best is None and problem is not None:
            self.notes.append(str(problem))
        return best[1] if best else None

    def _candidates(self) -> list[str]:
        names = [str(a) for a in self.base.config.get("architectures") or ()]
        names += [self.trained_class] if self.trained_class else []
        names += [HEADS[self.task]] if self.task in HEADS else []
        return list(dict.fromkeys([*names, "AutoModel"]))

    def parameter(self, name: str) -> Parameter | None:
        """The parameter of that name, or None. A stored key of exactly that name counts as one.

        `Refused` where the parameter is stored through a conversion that does more than move elements.
        """
        if self.model is not None:
            if name in self.model.unreadable:
                raise self.model.unreadable[name]
            if name in self.model.parameters:
                return self.model.parameters[name]
        spec = self.base.tensors.get(name)
        if spec is not None:
            return Parameter(name, spec.shape, (identity_slot(name, spec.shape),))
        return self.model.by_old_name(name) if self.model is not None else None

    def all(self) -> Collection[str]:
        """Names of all stored parameters."""
        return self.model.parameters if self.model is not None else self.base.tensors

    def layer(self, module: str) -> str | None:
        """The class name of a module ('Linear', 'Conv1D', ...), or None where the model was not built."""
        return self.model.layer(module) if self.model is not None else None

    def groups(self, module: str) -> int:
        """A convolution's groups; 1 where the model was not built."""
        return self.model.groups(module) if self.model is not None else 1

    def children(self, module: str) -> list[str] | None:
        """Names of a module's own parameters in the order of its code, or None where the model was not built."""
        return self.model.children(module) if self.model is not None else None


class Skeleton:
    """A model of transformers on the meta device, and the slots of each of its parameters."""

    def __init__(self, base: Checkpoint, class_name: str):
        self.base, self.class_name = base, class_name
        self.model = _meta_model(base, class_name)
        self.state = self.model.state_dict()  # names and shapes of all parameters, stored or not
        self.renamings, self.converters = _conversions(self.model)
        self._experts: dict[
            tuple[str, str], dict[str, Slot]
        ] = {}  # where single experts lie in stacks, by stack
        self.unreadable: dict[
            str, AdapterkitError
        ] = {}  # parameters whose conversion is more than a move of elements
        self.parameters = self._find_parameters()

    def with_config(self, config: dict):
        """The same class without data, built with another config."""
        return _meta_model(replace(self.base, config=config), self.class_name)

    def by_old_name(self, name: str) -> Parameter | None:
        """The parameter that a file's or an older transformers' name means, or None.

        The loader's renames say which; one expert's matrix of a stack is found as a stack of one.
        """
        from transformers.core_model_loading import rename_source_key

        prefix = self.model.base_model_prefix
        new, pattern = rename_source_key(name, self.renamings, self.converters, prefix, self.state)
        if new == name or new not in self.parameters:
            return None
        return self.parameters[new] if pattern is None else self._expert(name, new, pattern)

    def _expert(self, name: str, stack_name: str, pattern: str) -> Parameter | None:
        """The matrix `name` (of experts.3.up_proj, say) in the stack that the loader would put it into."""
        stack = self.parameters[stack_name]
        number = re.search(pattern.replace("*", r"(\d+)"), name)
        if len(stack.shape) != 3 or number is None or not stack.whole:
            return None
        which = (stack_name, name.replace(number[0], "*"))
        if which not in self._experts:
            self._experts[which] = self._expert_slots(name, number[0], stack_name, pattern)
        held = self._experts[which].get(name)
        if held is None:
            return None
        axes = tuple(Axis(0, i, range(axis.at, axis.stop)) for i, axis in enumerate(held.axes))
        slot = Slot(stack.slots[0].key, stack.shape, axes)
        return Parameter(name, tuple(len(axis.of) for axis in axes), (slot,))

    def _expert_slots(
        self, name: str, number: str, stack_name: str, pattern: str
    ) -> dict[str, Slot]:
        """Where the loader would put each expert's matrices in a stack, by the names that stand for `name`'s `number`."""
        stack = self.parameters[stack_name]
        converter = next(c for c in self.converters if pattern in c.source_patterns)
        shape = (stack.shape[1] // len(converter.source_patterns), stack.shape[2])
        sources: list[Source] = []
        for other in converter.source_patterns:
            for expert in range(stack.shape[0]):
                text = other.replace("*", str(expert)).replace("\\", "")
                sources.append((name.replace(number, text), other, shape))
        symbol = self._converted(stack_name, converter, sources)[stack_name]
        return (
            {slot.key: slot for slot in symbol.slots} if tuple(symbol.shape) == stack.shape else {}
        )

    def renamed(self, key: str) -> str:
        """The parameter that the loader puts a stored tensor of that name into."""
        from transformers.core_model_loading import rename_source_key

        return rename_source_key(
            key, self.renamings, self.converters, self.model.base_model_prefix, self.state
        )[0]

    def layer(self, module: str) -> str | None:
        try:
            return type(self.model.get_submodule(module)).__name__
        except AttributeError:
            return None

    def children(self, module: str) -> list[str] | None:
        try:
            found = self.model.get_submodule(module)
        except AttributeError:
            return None
        return [name for name, _ in found.named_parameters(recurse=False)]

    def groups(self, module: str) -> int:
        """A convolution's groups; 1 for any other module."""
        try:
            return int(getattr(self.model.get_submodule(module), "groups", 1))
        except AttributeError:
            return 1

    def _find_parameters(self) -> dict[str, Parameter]:
        shapes = {name: tuple(tensor.shape) for name, tensor in self.state.items()}
        slots = self._slots(self.state)
        tied = tied_names(self.model)
        found: dict[str, Parameter] = {}
        for name, shape in shapes.items():
            held, others = slots.get(name), tied.get(name, ())
            if held is None:  # a tied parameter that is not stored itself is where its twin is
                held = next((slots[other] for other in others if other in slots), None)
            if held is not None:
                found[name] = Parameter(
                    name, _stored_shape(shape, held), held, others, name not in slots
                )
        return found

    def _slots(self, state: dict) -> dict[str, tuple[Slot, ...]]:
        """Slots of every parameter, by running the loader's renames and conversions on symbols."""
        from transformers.core_model_loading import dot_natural_key, rename_source_key

        renamings, converters = self.renamings, self.converters
        by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
        prefix = self.model.base_model_prefix
        found: dict[str, tuple[Slot, ...]] = {}
        running: dict[str, list[Source]] = {}
        for key in sorted(self.base.tensors, key=dot_natural_key):
            name, pattern = rename_source_key(key, renamings, converters, prefix, state)
            if name not in state and key in state:
                name, pattern = rename_source_key(key, [], [], prefix, state)
            if name not in state:
                continue  # a key that the loader leaves alone too: passed through
            shape = self.base.tensors[key].shape
            if pattern is None:
                found[name] = (identity_slot(key, shape),)
            else:
                running.setdefault(name, []).append((key, pattern, shape))
        known: dict[tuple, tuple[str, list[Source], dict[str, tuple[Slot, ...]]]] = {}
        for first, sources in running.items():
            converter = by_pattern[sources[0][1]]
            like = (
                id(converter),
                self._alike(first, converter),
                tuple((pattern, shape) for _, pattern, shape in sources),
            )
            try:
                converted = _renumbered(first, sources, *known[like]) if like in known else None
                if converted is None:
                    converted = {
                        name: made.slots
                        for name, made in self._converted(first, converter, sources).items()
                    }
                    known.setdefault(like, (first, sources, converted))
            except AdapterkitError as error:
                self.unreadable[first] = error
                continue
            found |= {name: slots for name, slots in converted.items() if name in state}
        return found

    def _alike(self, name: str, converter) -> tuple:
        """What a conversion may ask about the parameter that it makes: its name, but for numbers, and its targets' shapes."""
        first, *others = converter.target_patterns
        targets = [name, *(name.replace(first, other) for other in others)]
        shapes = tuple(
            tuple(self.state[target].shape) if target in self.state else None for target in targets
        )
        return tuple("#" if part.isdigit() else part for part in name.split(".")), shapes

    def _converted(self, name: str, converter, sources: list[Source]) -> dict[str, Symbol]:
        """What a converter makes of stored tensors, by name: its operations run on symbols."""
        converter = deepcopy(converter)
        for key, pattern, shape in sources:
            converter.add_tensor(name, key, pattern, Symbol.of(key, shape))
        try:
            made = converter.convert(name, model=self.model, config=self.model.config)
        except AdapterkitError as error:
            operations = ", ".join(type(op).__name__ for op in converter.operations)
            raise Refused(
                f"{shown(name)} is stored through {operations}: {error.found}",
                expected="conversions that move elements along axes",
                where=self.base.name,
                hint="save the model once with transformers (from_pretrained, save_pretrained) and use that as the base",
            ) from error
        return {
            key: symbol[0] if isinstance(symbol, list) else symbol for key, symbol in made.items()
        }


def _renumbered(
    name: str,
    sources: list[Source],
    other: str,
    others: list[Source],
    converted: dict[str, tuple[Slot, ...]],
) -> dict[str, tuple[Slot, ...]] | None:
    """What `other` was converted to, for a name of other numbers (another layer); None where its names do not tell how."""
    mine, theirs = name.split("."), other.split(".")
    keys = {there: here for (here, _, _), (there, _, _) in zip(sources, others, strict=True)}
    found = {}
    for key, slots in converted.items():
        parts = key.split(".")
        if len(parts) != len(theirs):
            return None
        for i, (here, there) in enumerate(zip(mine, theirs, strict=True)):
            if here != there:
                if parts[i] != there:
                    return None
                parts[i] = here
        found[".".join(parts)] = tuple(
            Slot(keys[slot.key], slot.shape, slot.axes) for slot in slots
        )
    return found


def tied_names(model) -> dict[str, tuple[str, ...]]:
    """Names that share one parameter, each with the others of its group."""
    groups: dict[str, set[str]] = {}
    for a, b in dict(getattr(model, "all_tied_weights_keys", None) or {}).items():
        group = groups.get(a, {a}) | groups.get(b, {b})
        for name in group:
            groups[name] = group
    return {name: tuple(sorted(group - {name})) for name, group in groups.items()}


def _conversions(model) -> tuple[list, list]:
    """The loader's renames and conversions for a model, in its order."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    mapping = get_model_conversion_mapping(model)
    renamings = [t for t in mapping if isinstance(t, WeightRenaming)]
    return renamings, [t for t in mapping if isinstance(t, WeightConverter)]


def _stored_shape(shape: tuple[int, ...], slots: tuple[Slot, ...]) -> tuple[int, ...]:
    """The parameter's true shape: a checkpoint may hold another vocabulary than the config says."""
    if len(slots) == 1 and slots[0].whole:
        return tuple(len(axis.of) for axis in slots[0].axes)
    return shape


def _meta_model(base: Checkpoint, class_name: str):
    import logging

    import torch
    import transformers
    from transformers.utils import logging as their_logging

    auto = class_name.startswith("AutoModel")
    if not re.fullmatch(r"[A-Z]\w*", class_name):
        raise Refused(
            f"{shown(class_name)} is no class's name", where=base.name
        )  # of a module, naming it would import it
    config = _config(base)
    cls = getattr(transformers, class_name, None)
    if not isinstance(cls, type) or not (
        auto or issubclass(cls, transformers.PreTrainedModel)
    ):  # a file may say anything
        raise Refused(
            f"{shown(class_name)} is no model of transformers {transformers.__version__}",
            where=base.name,
        )
    before = their_logging.get_verbosity()
    their_logging.set_verbosity(logging.ERROR)
    try:
        with torch.device("meta"):
            model = getattr(cls, "from_config", cls)(config) if auto else cls(config)
    except Exception as error:  # any model's code may fail on a config it does not like
        raise Refused(
            f"transformers cannot build {shown(class_name)}: {shown(error)}",
            where=base.name,
            hint="update transformers",
        ) from error
    finally:
        their_logging.set_verbosity(before)
    if not isinstance(model, transformers.PreTrainedModel):
        raise Refused(f"{shown(class_name)} is no model", where=base.name)
    return model


def _config(base: Checkpoint):
    """transformers' config object, from the base's config.json without its pointers to custom code."""
    from transformers import AutoConfig

    plain = {k: v for k, v in base.config.items() if k != "auto_map"}
    for part in (plain, *(value for value in plain.values() if isinstance(value, dict))):
        if isinstance(part.get("backbone"), str):  # transformers would look it up on the Hub
            found, hint = (
                f"backbone {shown(part['backbone'])}",
                "names that equal the stored keys work without it",
            )
            raise Refused(
                found,
                expected="a model without another one inside",
                where=f"{base.name}/config.json",
                hint=hint,
            )
    try:
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "config.json").write_text(json.dumps(plain))
            return AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # an unknown type, or values that its class refuses
        raise Refused(
            f"transformers cannot read the config of model_type {shown(plain.get('model_type'))!r}: {shown(error)}",
            where=f"{base.name}/config.json",
            hint="update transformers; names that equal the stored keys work without it",
        ) from error

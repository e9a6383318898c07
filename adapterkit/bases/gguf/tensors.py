"""The parameters of a GGUF file's model, each with the GGUF tensors that it is built from.

llama.cpp changes names and layouts (q and k permuted for llama, 1 added to Gemma's norms, experts
stacked). transformers inverts that in two ways: with a table of names and `TENSOR_PROCESSORS`, and
for newer architectures with conversion rules.
"""

import math
import re
from collections.abc import Container, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest import mock

from adapterkit.bases.gguf.config import FREQUENCIES
from adapterkit.bases.gguf.file import GgufFile, conversion_rules
from adapterkit.bases.gguf.header import MAX_ERRORS, Entry
from adapterkit.bases.gguf.placement import Build, ReadArray, RowPlacement, find_placement
from adapterkit.bases.gguf.tables import TableNames
from adapterkit.bases.gguf.weight import GgufWeight, as_tensor, converted
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.errors import Damaged, Problems, shown
from adapterkit.core.lazy import Tensor
from adapterkit.core.weights.skeleton import Skeleton


def tensor_names(file: GgufFile, model: Skeleton, arguments: dict[str, Any]) -> "_Table | _Rules":
    """transformers' name mapping for the file; `arguments`: of its config as transformers read
    it."""
    rules = conversion_rules()

    import gguf

    def create() -> _Table | _Rules:
        if file.architecture in rules:
            return _Rules(rules[file.architecture](model.model.config))
        from transformers import modeling_gguf_pytorch_utils as utils

        processor = utils.TENSOR_PROCESSORS.get(file.architecture, utils.TensorProcessor)
        processor = processor(config=arguments)
        # otherwise made again for each module, which takes half a minute
        once = cache(gguf.get_tensor_name_map)
        with mock.patch.object(gguf, "get_tensor_name_map", once):
            return _Table(processor, utils.get_gguf_hf_weights_map(model.model, processor))

    return file.call_transformers("names", create)


@dataclass(frozen=True)
class _Table:
    """The older way: GGUF's names to parameters' names, and a processor of arrays."""

    processor: Any
    names: Mapping[str, str]

    def target(self, name: str) -> str | None:
        """The parameter of a GGUF tensor, or the one it is a slice of; None if transformers has
        none. Stacks of experts have no `.weight`."""
        return self.names.get(name) or self.names.get(name.removesuffix(".weight"))

    def build(self, key: str, names: list[str]) -> Build:
        return _Processed(self, key, tuple(names))


@dataclass(frozen=True)
class _Processed:
    """A parameter from a processor of arrays."""

    table: _Table
    key: str
    names: tuple[str, ...]

    def __call__(self, read: ReadArray, /) -> Tensor:
        tensors: dict[str, Tensor] = {}
        names = self.table.names
        for name in self.names:
            arguments = {"tensor_key_mapping": names, "parsed_parameters": {"tensors": tensors}}
            result = self.table.processor.process(weights=read(name), name=name, **arguments)
            if result.name in names:
                tensors[names[result.name]] = as_tensor(result.weights)
        return tensors[self.key]


class _Rules:
    """The newer way: renames, then at most one converter of tensors."""

    def __init__(self, rules: list):
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        self.renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self.converters = [rule for rule in rules if isinstance(rule, WeightConverter)]

    def renamed(self, name: str) -> tuple[str, str | None]:
        """A tensor's parameter, and the converter's pattern that it matches."""
        from transformers.core_model_loading import rename_source_key

        return rename_source_key(name, self.renamings, self.converters)

    def target(self, name: str) -> str | None:
        return self.renamed(name)[0]

    def build(self, key: str, names: list[str]) -> Build:
        patterns = {
            name: pattern for name in names if (pattern := self.renamed(name)[1]) is not None
        }
        used = set(patterns.values())
        converter = next((c for c in self.converters if used & set(c.source_patterns)), None)
        if converter is None:
            return _Renamed(names[0])
        # in the order of the rule's sources, gate before up
        order = sorted(patterns, key=lambda name: converter.source_patterns.index(patterns[name]))
        return _Converted(converter, key, tuple((name, patterns[name]) for name in order))


@dataclass(frozen=True)
class _Renamed:
    """A parameter that is one GGUF tensor."""

    name: str

    def __call__(self, read: ReadArray, /) -> Tensor:
        return as_tensor(read(self.name))


@dataclass(frozen=True)
class _Converted:
    """A parameter from a converter of tensors."""

    converter: Any
    key: str
    sources: tuple[tuple[str, str], ...]  # names and the converter's patterns that they match

    def __call__(self, read: ReadArray, /) -> Tensor:
        parts = ((name, pattern, as_tensor(read(name))) for name, pattern in self.sources)
        return converted(self.converter, self.key, parts)


MAX_TRIED = 1 << 26  # values of a parameter up to which its shape is tried on zeros while planning


def model_tensors(
    file: GgufFile, model: Skeleton, names: "_Table | _Rules", number: int
) -> dict[str, TensorSpec]:
    """The model's parameters by name, of input `number` of the job; refused unless file and model
    match in full."""
    shapes = {name: tuple(value.shape) for name, value in model.state.items()}
    errors = file.errors
    groups: dict[str, list[Entry]] = {}
    unknown = []
    for entry in file.header.tensors:
        key = names.target(entry.name)
        if key is not None and key in shapes:
            groups.setdefault(key, []).append(entry)
        elif key is not None and _is_ignored(model, key, "_keys_to_ignore_on_load_unexpected"):
            name = shown(entry.name)
            file.notes.append(f"left out, because transformers has no such parameter: {name}")
        elif entry.name != FREQUENCIES:
            unknown.append(entry.name)
    if unknown:
        some = ", ".join(map(shown, unknown[:6]))
        problem = f"{len(unknown)} tensors that transformers does not load: {some}"
        errors.add(problem, f"the tensors of {model.class_name}", code="AK207")
    tied = model.tied
    missing = [
        key
        for key in shapes
        if key not in groups
        and not any(name in groups for name in tied.get(key, ()))
        and not _is_ignored(model, key, "_keys_to_ignore_on_load_missing")
    ]
    if missing:
        some = ", ".join(map(shown, missing[:6]))
        errors.add(
            f"the file has nothing for {len(missing)} parameters: {some}",
            f"all of {model.class_name}",
            "download the file again",
            kind=Damaged,
            code="AK207",
        )
    layouts = _Layouts(file.name, number)
    tensors: dict[str, TensorSpec] = {}
    for key, shape in shapes.items():
        if key in groups:
            build = names.build(key, [entry.name for entry in groups[key]])
            with errors.collected():
                tensors[key] = layouts.weight(key, shape, groups[key], build)
    Problems(errors[:MAX_ERRORS]).raise_all()
    return tensors


def tensors_by_table(
    file: GgufFile, names: TableNames, number: int, kept: Container[str]
) -> dict[str, TensorSpec]:
    """The parameters that a table names, of input `number` of the job. Tensors without a table
    entry, those that do not give their parameter, and `kept` keep their names."""
    groups: dict[str, list[Entry]] = {}
    for entry in file.header.tensors:
        target = None if entry.name in kept else names.target(entry.name)
        groups.setdefault(target or entry.name, []).append(entry)
    layouts = _Layouts(file.name, number)
    tensors: dict[str, TensorSpec] = {}
    for key, entries in groups.items():
        build = names.build(key, [entry.name for entry in entries])
        shape = names.shape(build, entries)
        if shape is not None:
            tensors[key] = layouts.weight(key, shape, entries, build)
            continue
        for entry in entries:
            own = _Renamed(entry.name)
            tensors[entry.name] = layouts.weight(entry.name, entry.shape, [entry], own)
    return tensors


class _Layouts:
    """The ways to build parameters from GGUF tensors, found once for each kind: their shape, on
    zeros (for the largest only the number of values), and their placement."""

    def __init__(self, file: str, number: int):
        self.file, self.number = file, number
        # by names without numbers, and shapes
        self.known: dict[Any, tuple[bool, RowPlacement | None]] = {}

    def weight(
        self, key: str, shape: tuple[int, ...], entries: list[Entry], build: Build
    ) -> GgufWeight:
        """The record of a parameter; `Damaged` if it cannot be built in its shape."""
        shapes = {entry.name: entry.shape for entry in entries}
        # layers may have the same tensors in another order
        names = tuple(re.sub(r"\d+", "#", name) for name in (key, *shapes))
        kind = (names, shape, tuple(shapes.values()))
        if kind not in self.known:
            self.known[kind] = _builds(build, shapes, shape), find_placement(shapes, build)
        fits, placement = self.known[kind]
        if not fits:
            problem = ", ".join(f"{shown(name)} {shape}" for name, shape in shapes.items())
            raise Damaged(
                problem[:500],
                expected=f"what {shown(key)} {shape} is made of",
                where=self.file,
                hint="download the file again",
                code="AK406",
            )
        return GgufWeight.of(
            (entry.stored(self.number) for entry in entries),
            key=key,
            dtype="F32",
            shape=shape,
            types=tuple(entry.type for entry in entries),
            shapes=tuple(shapes.values()),
            build=build,
            placement=placement,
            transposed=placement is not None and placement.transposed,
        )


def _builds(build: Build, shapes: Mapping[str, tuple[int, ...]], shape: tuple[int, ...]) -> bool:
    """Return whether GGUF tensors of these shapes build a parameter of that shape."""
    import numpy as np

    count = sum(map(math.prod, shapes.values()))
    if count != math.prod(shape) or count > MAX_TRIED:
        return count == math.prod(shape)
    zeros = lambda name: np.broadcast_to(np.float32(0), shapes[name])
    try:
        with np.errstate(all="ignore"):
            return tuple(build(zeros).shape) == shape
    except Exception:  # transformers' code, on shapes that it does not expect
        return False


def as_stored(
    entry: Entry,
    key: str | None = None,
    rows: Tensor | None = None,
    *,
    shape: tuple[int, ...] = (),
    number: int = 0,
) -> GgufWeight:
    """A tensor as it is in the file, under its own name or as a parameter with other `rows` or
    another `shape` of the same order; of input `number` of the job."""
    return GgufWeight.of(
        (entry.stored(number),),
        key=key or entry.name,
        dtype="F32",
        shape=shape or entry.shape,
        types=(entry.type,),
        shapes=(entry.shape,),
        build=_Renamed(entry.name),
        placement=RowPlacement((entry.shape,), rows),
    )


def _is_ignored(model: Skeleton, key: str, rule: str) -> bool:
    """Return whether transformers' loader ignores a key by that rule of the model's class."""
    patterns = getattr(model.model, rule, None) or ()
    return any(re.search(pattern, key) for pattern in patterns)

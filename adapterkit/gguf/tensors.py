"""The parameters of a GGUF file's model, each with the GGUF tensors that it is built from.

llama.cpp changes names and layouts (q and k permuted for llama, 1 added to Gemma's norms, experts
stacked). transformers undoes that in two ways: a table of names with `TENSOR_PROCESSORS`, and for
newer architectures conversion rules.
"""

import math
import re
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from adapterkit.checkpoint.header import TensorSpec
from adapterkit.errors import AdapterkitError, Damaged, Problems, Unrecoverable, shown
from adapterkit.gguf.config import FREQUENCIES
from adapterkit.gguf.file import GgufFile, conversion_rules
from adapterkit.gguf.header import MAX_ERRORS, Entry
from adapterkit.weights.codec import QuantizedWeight
from adapterkit.weights.skeleton import Skeleton, tied_names

ReadArray = Callable[[str], Any]  # a GGUF tensor's decoded values by its name, as a numpy array


class Build(Protocol):
    """Builds a parameter; a picklable record."""

    def __call__(self, read: ReadArray, /) -> Tensor: ...


class TensorNames(Protocol):
    """One of transformers' ways of reading an architecture."""

    def target(self, name: str) -> str | None:
        """The parameter that a GGUF tensor is, or is a part of; None if transformers has none."""
        ...

    def build(self, key: str, names: list[str]) -> Build:
        """How a parameter is built from the GGUF tensors of these names."""
        ...


def tensor_names(file: GgufFile, model: Skeleton, arguments: dict[str, Any]) -> TensorNames:
    """transformers' way of reading the file; `arguments`: of its config, as it read them."""
    rules = conversion_rules()

    def create() -> TensorNames:
        if file.architecture in rules:
            return _Rules(rules[file.architecture](model.model.config))
        from transformers import modeling_gguf_pytorch_utils as utils

        processor = utils.TENSOR_PROCESSORS.get(file.architecture, utils.TensorProcessor)
        processor = processor(config=arguments)
        return _Table(processor, utils.get_gguf_hf_weights_map(model.model, processor))

    return file.call_transformers("names", create)


@dataclass(frozen=True)
class _Table:
    """The older way: GGUF's names to parameters' names, and a processor of arrays."""

    processor: Any
    names: Mapping[str, str]

    def target(self, name: str) -> str | None:
        """Stacks of experts have no `.weight`."""
        return self.names.get(name) or self.names.get(name.removesuffix(".weight"))

    def build(self, key: str, names: list[str]) -> Build:
        return _Processed(self, key, tuple(names))


@dataclass(frozen=True)
class _Processed:
    """A parameter as a processor of arrays gives it."""

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
                tensors[names[result.name]] = _tensor(result.weights)
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
        return _tensor(read(self.name))


@dataclass(frozen=True)
class _Converted:
    """A parameter as a converter of tensors gives it."""

    converter: Any
    key: str
    sources: tuple[tuple[str, str], ...]  # names and the converter's patterns that they match

    def __call__(self, read: ReadArray, /) -> Tensor:
        converter = deepcopy(self.converter)
        for name, pattern in self.sources:
            converter.add_tensor(self.key, name, pattern, _tensor(read(name)))
        result: Any = converter.convert(self.key)[self.key]
        return result[0] if isinstance(result, list) else result


def _tensor(array: object) -> Tensor:
    import numpy as np
    import torch

    return torch.from_numpy(np.require(array, requirements=["C", "W"]))


MAX_TRIED = 1 << 26  # values of a parameter up to which its shape is tried on zeros while planning


@dataclass(frozen=True, kw_only=True)
class GgufWeight(QuantizedWeight):
    """One parameter, of one GGUF tensor or of several (experts' gate and up)."""

    entries: tuple[Entry, ...]
    build: Build = field(compare=False)

    @property
    def read_only(self) -> str | None:
        return "GGUF"

    def decode(self, stored: dict[str, Tensor]) -> Tensor:
        import gguf
        import numpy as np

        entries = {entry.name: entry for entry in self.entries}

        def read(name: str) -> Any:
            kind, shape = gguf.GGMLQuantizationType(entries[name].kind), entries[name].shape
            values, width = gguf.GGML_QUANT_SIZES[kind]
            blocks = stored.pop(name).numpy().reshape(*shape[:-1], shape[-1] // values * width)
            return gguf.dequantize(blocks, kind)

        with np.errstate(all="ignore"):  # values that are not finite are refused when written
            weight = self.build(read)
        if tuple(weight.shape) != self.shape:
            raise Unrecoverable(
                f"{shown(self.key)} comes out as {tuple(weight.shape)}",
                expected=str(self.shape),
                where=self.file,
                hint="convert it with llama.cpp's own tools",
            )
        return weight


def model_tensors(file: GgufFile, model: Skeleton, names: TensorNames) -> dict[str, TensorSpec]:
    """The model's parameters by name; refused unless file and model match in full."""
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
            file.notes.append(f"left out, as transformers has no such part: {name}")
        elif entry.name != FREQUENCIES:
            unknown.append(entry.name)
    if unknown:
        some = ", ".join(map(shown, unknown[:6]))
        problem = f"{len(unknown)} tensors that transformers has no place for: {some}"
        errors.add(problem, f"the tensors of {model.class_name}")
    tied = tied_names(model.model)
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
        )
    layouts = _Layouts()
    tensors: dict[str, TensorSpec] = {}
    for key, shape in shapes.items():
        if key in groups:
            build = names.build(key, [entry.name for entry in groups[key]])
            weight = _weight(file.name, key, shape, groups[key], build)
            tensors[key] = weight
            errors += layouts.errors(weight)
    Problems(errors[:MAX_ERRORS]).raise_all()
    return tensors


def _weight(
    file: str, key: str, shape: tuple[int, ...], entries: list[Entry], build: Build
) -> GgufWeight:
    parts = tuple(
        TensorSpec(entry.name, "U8", (entry.stop - entry.start,), file, entry.start, entry.stop)
        for entry in entries
    )
    return GgufWeight(
        key=key,
        dtype="F32",
        shape=shape,
        file=file,
        start=parts[0].start,
        stop=parts[0].stop,
        parts=parts,
        entries=tuple(entries),
        build=build,
    )


class _Layouts:
    """Checks that parameters come out in their shape: on zeros, once for each kind; of the largest
    ones only the number of values."""

    def __init__(self):
        self.shapes: dict[Any, tuple[int, ...] | None] = {}  # by name without numbers, and sources

    def errors(self, weight: GgufWeight) -> list[AdapterkitError]:
        sources = tuple(entry.shape for entry in weight.entries)
        count = sum(math.prod(shape) for shape in sources)
        fits = count == math.prod(weight.shape)
        if fits and count <= MAX_TRIED:
            kind = (re.sub(r"\d+", "#", weight.key), sources)
            if kind not in self.shapes:
                self.shapes[kind] = _shape_of_zeros(weight)
            fits = self.shapes[kind] == weight.shape
        if fits:
            return []
        problem = ", ".join(f"{shown(entry.name)} {entry.shape}" for entry in weight.entries)
        error = Damaged(
            problem[:500],
            expected=f"what {shown(weight.key)} {weight.shape} is made of",
            where=weight.file,
            hint="download the file again",
        )
        return [error]


def _shape_of_zeros(weight: GgufWeight) -> tuple[int, ...] | None:
    """The shape that a parameter has when it is built from zeros; None if that fails."""
    import numpy as np

    shapes = {entry.name: entry.shape for entry in weight.entries}
    zeros = lambda name: np.broadcast_to(np.float32(0), shapes[name])
    try:
        with np.errstate(all="ignore"):
            return tuple(weight.build(zeros).shape)
    except Exception:  # transformers' code, on shapes that it does not expect
        return None


def _is_ignored(model: Skeleton, key: str, rule: str) -> bool:
    """Whether transformers' loader passes over a key by that rule of the model's class."""
    patterns = getattr(model.model, rule, None) or ()
    return any(re.search(pattern, key) for pattern in patterns)

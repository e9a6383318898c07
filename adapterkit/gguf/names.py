"""Which parameter a GGUF tensor belongs to, and how the parameter is built from its tensors.

llama.cpp changes names and layouts (q and k permuted for llama, 1 added to Gemma's norms, experts
stacked). transformers undoes that in two ways: a table of names with `TENSOR_PROCESSORS`, and for
newer architectures conversion rules.
"""

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from adapterkit.gguf.file import GgufFile, conversion_rules
from adapterkit.weights.skeleton import Skeleton

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


def _tensor(array: Any) -> Tensor:
    import numpy as np
    import torch

    return torch.from_numpy(np.require(array, requirements=["C", "W"]))

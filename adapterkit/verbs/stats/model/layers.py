"""Divide a model into the units that run one at a time."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

from torch import nn

from adapterkit.core.weights.layers import reads_weight
from adapterkit.verbs.stats.model.stored_model import StoredModel

LARGE = 1 << 20  # bytes of a layer outside the lists of layers that is run by itself


@dataclass(frozen=True, eq=False)
class OffloadedLayer:
    """A module whose parameters are in memory only while all batches go through it."""

    name: str
    order: int  # in the model
    module: nn.Module
    parameters: tuple[str, ...]
    is_layer: bool  # an element of a list


@dataclass(frozen=True)
class OffloadedLayers:
    """The units of a model, and the parameters outside of them, which stay in memory.

    A unit is an element of an outermost ModuleList, or a large embedding or linear layer outside
    these. If code around an element calls its modules one by one, each of them is a unit, `inner`.
    """

    outer: list[OffloadedLayer]
    inner: list[OffloadedLayer]
    outside: list[str]

    @classmethod
    def of(cls, stored: StoredModel) -> "OffloadedLayers":
        model = stored.model
        names = {name: module for name, module in model.named_modules() if name}
        elements = dict.fromkeys(_elements(model))
        large = [
            name
            for name, module in names.items()
            if isinstance(module, nn.Linear | nn.Embedding)
            and not is_within(name, elements)
            and stored.nbytes(stored.parameters(name)) >= LARGE
            and not _is_read(model, name)
        ]
        order = {name: number for number, name in enumerate(names)}
        unit = lambda name: OffloadedLayer(
            name, order[name], names[name], tuple(stored.parameters(name)), name in elements
        )
        outer = sorted(map(unit, [*elements, *large]), key=lambda unit: unit.order)
        outer = [unit for unit in outer if unit.parameters]
        inner = [
            unit(name)
            for name, module in names.items()
            if module._parameters and is_within(name, elements) and name not in elements
        ]
        inside = {name for unit in outer for name in unit.parameters}
        outside = [name for name in stored.parameters() if name not in inside]
        return cls(outer, inner, outside)

    @property
    def has_layers(self) -> bool:
        return bool(self.inner)

    def unit_of(self, module: str) -> OffloadedLayer | None:
        """The unit of a module, None outside of units."""
        return next((self._by_name[n] for n in _around(module) if n in self._by_name), None)

    @cached_property
    def _by_name(self) -> dict[str, OffloadedLayer]:
        return {unit.name: unit for unit in self.outer}


def _elements(module: nn.Module, prefix: str = "") -> Iterator[str]:
    """Names of the elements of the outermost ModuleLists."""
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if isinstance(child, nn.ModuleList):
            yield from (f"{path}.{key}" for key, _ in child.named_children())
        else:
            yield from _elements(child, f"{path}.")


def is_within(name: str, others: Collection[str]) -> bool:
    """True if a module is one of these, or in one."""
    return any(around in others for around in _around(name))


def _around(name: str) -> Iterator[str]:
    """Yield the names of the modules around one, the outermost first, and its own."""
    return accumulate(name.split("."), "{}.{}".format)


def _is_read(model: nn.Module, name: str) -> bool:
    """True if the code around a layer reads its weight itself."""
    parent, _, leaf = name.rpartition(".")
    around: Any = model.get_submodule(parent)
    return reads_weight(type(around).__mro__, leaf)

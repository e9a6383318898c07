"""Weights of active adapters: one number, or a file's weights for modules and directions."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from adapterkit.core.errors import Problems, Refused, by_reason, did_you_mean, listed, shown
from adapterkit.core.inputs.sources import open_adapter, open_source
from adapterkit.core.inputs.weights_file import (
    NamedAdapter,
    Weight,
    WeightsFile,
    check_same,
    read_weights,
    sources_of,
)
from adapterkit.core.options import Sources, StrPath, finite
from adapterkit.core.records import Json

if TYPE_CHECKING:
    from adapterkit.runtime.state import State


class ModuleWeight(float):
    """An adapter's weight from a file; its number is for modules that the file does not name."""

    def __new__(cls, file: WeightsFile, number: int) -> ModuleWeight:
        self = super().__new__(cls, file.default[number])
        self.file, self.number = file, number
        return self

    file: WeightsFile
    number: int  # the adapter's in the file

    def __reduce__(self) -> tuple:
        return ModuleWeight, (self.file, self.number)

    def on(self, module: str) -> Weight:
        """The weight on a module or parameter: one number, or one per direction of its delta."""
        return self.file.weights_of(self.number, module)


def weight_on(weight: float, module: str) -> Weight:
    """A weight on a module or parameter."""
    return weight.on(module) if isinstance(weight, ModuleWeight) else weight


def named(names: object) -> Json:
    """Names with their weights, unchecked; `Refused` for other values."""
    if names is None or isinstance(names, str):
        return {} if names is None else {names: 1.0}
    items = list(names) if isinstance(names, Iterable) else [names]
    if not all(isinstance(name, str) for name in items):
        raise Refused(
            f"adapters {shown(repr(names))}",
            expected="a name, a list of names, a map of names to weights, or None",
            where="weights",
            code="AK802",
        )
    # `weights_of` checks the values of a caller's map, whose type is unknown
    return dict(names) if isinstance(names, Mapping) else dict.fromkeys(items, 1.0)  # type: ignore[arg-type]


def unique(names: Sequence[str]) -> list[str]:
    """Unique names: the second `checkpoint-9` becomes `checkpoint-9-2`."""
    result: list[str] = []
    for name in names:
        numbered = (f"{name}-{number}" for number in itertools.count(2))
        result.append(name if name not in result else next(n for n in numbered if n not in result))
    return result


def named_sources(sources: Sources, weights: StrPath) -> dict[str, StrPath]:
    """The sources of a weights file's adapters by the names of their folders, the second
    `checkpoint-9` as `checkpoint-9-2`, in its order; `sources`: other locations than the file's.
    `Refused` for other adapters than the file's."""
    folder = open_source(weights)
    file, errors = read_weights(folder), Problems(where=folder.label)
    names: list[str] = []
    places = sources_of(sources, weights, file, errors)
    for source, one in zip(places, file.adapters, strict=True):
        with errors.collected():
            adapter = open_adapter(source)
            check_same(one, adapter, folder.label)
            names.append(adapter.name)
    errors.raise_all()
    return dict(zip(unique(names), places, strict=True))


def by_module(state: State, names: Sequence[str], weights: StrPath) -> dict[str, float]:
    """The weights of loaded adapters, in the file's order; `Refused` for weights of directions on
    unsuitable modules, and for modules that none of the adapters has."""
    folder = open_source(weights)
    file, errors = read_weights(folder), Problems(where=folder.label, code="AK112")
    if len(names) != len(file.adapters):
        errors.fail(
            f"adapters: {len(names)}, but the file has weights of {len(file.adapters)}",
            f"in this order: {listed([one.name for one in file.adapters])}",
            "name those of the file",
        )
    table = {name: ModuleWeight(file, number) for number, name in enumerate(names)}
    errors += undirected(state, table, folder.label)
    seen = _modules_of(state, table)
    unknown = [name for name in file.modules if name not in seen]
    if unknown:
        errors.add(
            f"weights of {len(unknown)} modules that no adapter has: {listed(unknown)}",
            "names of modules, of experts with their parameter's",
            did_you_mean(unknown[:3], seen) or "remove them from the file",
        )
    errors.raise_all()
    return dict(table)


def weights_of(state: State, names: object) -> dict[str, float]:
    """Names of adapters with their weights, from a name, a list of names, a map or None;
    `Refused` for anything else, for unknown names and for weights that are not finite."""
    table = named(names)
    state.known(table)
    wrong = {n: v for n, v in table.items() if isinstance(v, str) or finite(v) is None}
    if wrong:
        problem = ", ".join(f"weight {value!r} of {shown(name)}" for name, value in wrong.items())
        raise Refused(
            problem, expected="finite numbers", where="weights", hint="give numbers", code="AK112"
        )
    weights = {n: v if isinstance(v, ModuleWeight) else float(v) for n, v in table.items()}
    undirected(state, weights, "weights").raise_all()
    return weights


def undirected(state: State, table: Mapping[str, float], where: str) -> Problems:
    """Refusals of weights of directions on modules that cannot have them."""
    errors = Problems(where=where, hint="choose the weights for these adapters", code="AK112")
    for name, weight in table.items():
        adapter, found = state.adapters[name], []
        for site, patch in adapter.patches():
            own = weight_on(weight, module := patch.named(site.path))
            if isinstance(own, tuple):
                trained = "it is trainable" if adapter.trainable else None
                found.append((module, trained or patch.undirected(own)))
        for reason, modules in by_reason(found).items():
            errors.add(
                f"weights of directions of {shown(name)} on {listed(modules)}: {reason}",
                "one number for each singular triplet of a product of two factors, or one for all",
            )
    return errors


def as_file(state: State, table: Mapping[str, float]) -> WeightsFile | None:
    """The weights file equal to a table; None if numbers alone express it."""
    files = [weight.file for weight in table.values() if isinstance(weight, ModuleWeight)]
    if not files:
        return None
    known = _modules_of(state, table) & {name for file in files for name in file.modules}
    modules = {name: tuple(weight_on(w, name) for w in table.values()) for name in sorted(known)}
    adapters = tuple(NamedAdapter(str(number)) for number in range(len(table)))
    return WeightsFile(adapters, tuple(map(float, table.values())), modules, "direction")


def _modules_of(state: State, names: Iterable[str]) -> set[str]:
    """The modules of adapters, as a weights file names them."""
    patches = [pair for name in names for pair in state.adapters[name].patches()]
    return {patch.named(site.path) for site, patch in patches}

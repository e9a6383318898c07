"""Adapters of a model with the weights that a file has for them."""

from collections.abc import Iterable, Mapping, Sequence

from adapterkit.adapters.weights_file import NamedAdapter, WeightsFile, read_weights
from adapterkit.errors import Problems, did_you_mean, listed
from adapterkit.options import Sources, StrPath
from adapterkit.planning.inputs.sources import open_adapter, open_source
from adapterkit.planning.inputs.weights import check_same, sources_of
from adapterkit.runtime.by_module import ModuleWeight, weight_on
from adapterkit.runtime.state import State, undirected, unique


def named_sources(sources: Sources, weights: StrPath) -> dict[str, StrPath]:
    """The adapters of a file of weights by the names of their folders, the second `checkpoint-9` as
    `checkpoint-9-2`, in its order, where they are; `sources`: where, if not where the file says.
    `Refused` for others than its adapters."""
    folder = open_source(weights)
    file, errors = read_weights(folder), Problems(where=folder.label)
    names: list[str] = []
    places = sources_of(sources, weights, file, errors)
    for source, named in zip(places, file.adapters, strict=True):
        with errors.collected():
            adapter = open_adapter(source)
            check_same(named, adapter, folder.label)
            names.append(adapter.name)
    errors.raise_all()
    return dict(zip(unique(names), places, strict=True))


def by_module(state: State, names: Sequence[str], weights: StrPath) -> dict[str, float]:
    """The weights of adapters that are loaded, in the file's order; `Refused` for what cannot have
    those of directions, and for modules that none of them has."""
    folder = open_source(weights)
    file, errors = read_weights(folder), Problems(where=folder.label)
    if len(names) != len(file.adapters):
        errors.fail(
            f"{len(names)} adapters, and weights of {len(file.adapters)}",
            f"in this order: {listed([one.name for one in file.adapters])}",
            "name those of the file",
        )
    table = {name: ModuleWeight(file, number) for number, name in enumerate(names)}
    errors += undirected(state, table, folder.label)
    _check_names(file, _modules_of(state, table), errors)
    errors.raise_all()
    return dict(table)


def as_file(state: State, table: Mapping[str, float]) -> WeightsFile | None:
    """The file of weights that says the same as a table; None where one number says it for each
    adapter."""
    files = [weight.file for weight in table.values() if isinstance(weight, ModuleWeight)]
    if not files:
        return None
    named = _modules_of(state, table) & {name for file in files for name in file.modules}
    modules = {name: tuple(weight_on(w, name) for w in table.values()) for name in sorted(named)}
    adapters = tuple(NamedAdapter(str(number)) for number in range(len(table)))
    return WeightsFile(adapters, tuple(map(float, table.values())), modules, "direction")


def _modules_of(state: State, names: Iterable[str]) -> set[str]:
    """The modules of adapters, as a file of weights names them."""
    parts = [pair for name in names for pair in state.adapters[name].parts()]
    return {part.named(site.path) for site, part in parts}


def _check_names(file: WeightsFile, seen: set[str], errors: Problems) -> None:
    unknown = [name for name in file.modules if name not in seen]
    if unknown:
        errors.add(
            f"weights of {len(unknown)} modules that no adapter has: {listed(unknown)}",
            "names of modules, of experts with their parameter's",
            did_you_mean(unknown[:3], seen) or "remove them from the file",
        )

"""Adapters of a model with the weights that a file has for them."""

from collections.abc import Iterator, Sequence

from adapterkit.adapters.weights_file import WeightsFile, read_weights
from adapterkit.errors import Problems, by_reason, did_you_mean, listed, shown
from adapterkit.options import Sources, StrPath
from adapterkit.planning.inputs.sources import open_adapter, open_source
from adapterkit.planning.inputs.weights import check_same, sources_of
from adapterkit.runtime.by_module import ModuleWeight
from adapterkit.runtime.state import State


def named_sources(sources: Sources, weights: StrPath) -> dict[str, StrPath]:
    """The adapters of a file of weights by the names of their folders, in its order, where they
    are; `sources`: where, if not where the file says. `Refused` for others than its adapters."""
    folder = open_source(weights)
    file, errors = read_weights(folder), Problems(where=folder.label)
    found: dict[str, StrPath] = {}
    places = sources_of(sources, weights, file, errors)
    for source, named in zip(places, file.adapters, strict=True):
        with errors.collected():
            adapter = open_adapter(source)
            check_same(named, adapter, folder.label)
            if adapter.name in found:
                errors.add(
                    f"two adapters of the name {shown(adapter.name)}",
                    "names that differ",
                    "load each with a name=, then activate([...], weights=...)",
                )
            found[adapter.name] = source
    errors.raise_all()
    return found


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
    seen: set[str] = set()
    for name, weight in table.items():
        reasons = by_reason(_undirected(state, name, weight, seen))
        for reason, modules in reasons.items():
            errors.add(
                f"weights of directions of {shown(name)} on {listed(modules)}: {reason}",
                "one number for each singular triplet of a product of two factors, or one for all",
                "choose the weights for these adapters",
            )
    _check_names(file, seen, errors)
    errors.raise_all()
    return dict(table)


def _undirected(
    state: State, name: str, weight: ModuleWeight, seen: set[str]
) -> Iterator[tuple[str, str | None]]:
    """Modules of an adapter with the reason why these cannot have the weights of directions that
    they are to have; all join those that are seen."""
    adapter = state.adapters[name]
    for site, part in adapter.parts():
        module = part.named(site.path)
        seen.add(module)
        own = weight.on(module)
        if isinstance(own, tuple):
            trained = "it is trainable" if adapter.trainable else None
            yield module, trained or part.undirected(own)


def _check_names(file: WeightsFile, seen: set[str], errors: Problems) -> None:
    unknown = [name for name in file.modules if name not in seen]
    if unknown:
        errors.add(
            f"weights of {len(unknown)} modules that no adapter has: {listed(unknown)}",
            "names of modules, of experts with their parameter's",
            did_you_mean(unknown[:3], seen) or "remove them from the file",
        )

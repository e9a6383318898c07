"""Which adapters can act together."""

from collections.abc import Iterable
from itertools import combinations

from adapterkit.errors import AdapterkitError, Problems, listed, shown
from adapterkit.runtime.site import Part
from adapterkit.runtime.state import State


def conflicts(state: State, names: Iterable[str], where: str) -> list[AdapterkitError]:
    """Refusals of adapters that give different values to the same parameters."""
    names = list(dict.fromkeys(names))
    errors = Problems(where=where, hint="use one of them at a time")
    expected = "one adapter for each trained value"
    trained = [name for name in names if state.adapters[name].config.bias != "none"]
    if len(trained) > 1:
        errors.add(f"{', '.join(map(shown, trained))} have trained biases", expected)
    clashes: dict[tuple[str, str, str], list[str]] = {}
    for path, parts in _special(state, names).items():
        for part, other in combinations(parts, 2):
            reason = part.adapter != other.adapter and (part.clash(other) or other.clash(part))
            if reason:
                clashes.setdefault((part.adapter, other.adapter, reason), []).append(path)
        for part in parts:
            if part.role == "copy":
                for other, inner in _inside(state, names, path, part):
                    reason = f"a trained copy of {shown(path)}, and the other one adapts"
                    clashes.setdefault((part.adapter, other, reason), []).append(inner)
    for (first, second, reason), paths in clashes.items():
        errors.add(f"{shown(first)} and {shown(second)} have {reason}: {listed(paths)}", expected)
    return errors


def _special(state: State, names: list[str]) -> dict[str, list[Part]]:
    """By module the parts of these adapters that do more than add to the module's output."""
    special: dict[str, list[Part]] = {}
    for name in names:
        for site, part in state.adapters[name].parts():
            if not part.role.startswith("delta"):
                special.setdefault(site.path, []).append(part)
    return special


def _inside(state: State, names: list[str], path: str, copy: Part) -> Iterable[tuple[str, str]]:
    """The adapters other than the copy's with parts inside a module, and where."""
    for name in names:
        if name != copy.adapter:
            for inner in state.adapters[name].sites:
                if inner.startswith(f"{path}."):
                    yield name, inner

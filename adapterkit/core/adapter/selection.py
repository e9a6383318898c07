"""Select modules by their names, and refuse entries that match nothing."""

import re
from collections.abc import Iterable, Sequence

from adapterkit.core.adapter.record import Adapter
from adapterkit.core.adapter.targets import NAMES, TargetMatcher, entries_in, has_end
from adapterkit.core.errors import Refused


class Selection:
    """The modules that --include and --exclude select: all without `include`, minus those that
    `exclude` matches. If names begin with the component of a pipeline, the component's name alone
    means all its modules."""

    def __init__(
        self,
        include: str | Sequence[str] | None,
        exclude: str | Sequence[str] | None,
        has_components: bool = False,
    ):
        self.has_components = has_components
        self.included = TargetMatcher(entries_in(include), "--include") if include else None
        self.excluded = TargetMatcher(entries_in(exclude), "--exclude") if exclude else None
        self.known: set[str] = set()  # names that the options were given for

    def __call__(self, *names: str) -> bool:
        """Return whether a module is selected by any of its names."""
        names = (*names, *self._components(names))
        included, excluded = self.included, self.excluded
        is_included = included is None or any(map(included, names))
        return is_included and not (excluded is not None and any(map(excluded, names)))

    def refusals(self, expected: str) -> list[Refused]:
        """The refusals of entries that match none of the known names."""
        known = self.known.union(self._components(self.known))
        given = [one for one in (self.included, self.excluded) if one is not None]
        return [refusal for one in given for refusal in one.refusals(known, expected)]

    def _components(self, names: Iterable[str]) -> set[str]:
        return {name.partition(".")[0] for name in names} if self.has_components else set()


def selectable_names(adapter: Adapter) -> set[str]:
    """The names that an option may give: of adapted and of fully trained modules, and of replaced
    parameters."""
    factors = {lora.module for lora in adapter.loras}
    modules = (name.rpartition(".")[0] for name in adapter.replaced)
    tokens = (tokens.module for tokens in adapter.tokens)
    return factors.union(tokens, modules, adapter.replaced, adapter.saved)


def ends_of(adapter: Adapter, names: Sequence[str]) -> set[str]:
    """Short ends of names that match these replaced parameters, and no adapted module; the full
    names if there are none."""
    ends = {_end_of(adapter, name) for name in names}
    is_shared = any(has_end(lora.module, end) for lora in adapter.loras for end in ends)
    return set(names) if is_shared else ends


def _end_of(adapter: Adapter, name: str) -> str:
    """The end of a replaced parameter's name: that of its module if this is fully trained."""
    if not adapter.saves(name):
        return "bias" if has_end(name, "bias") else name
    module = name.rpartition(".")[0]
    last = module.rpartition(".")[2]
    return module if last.isdigit() else last


def text_of_entries(ends: Iterable[str]) -> str:
    """The text of an option that names modules by these ends of names: a list, or a regular
    expression if one of them has other characters."""
    ends = sorted(set(ends))
    if all(map(NAMES.fullmatch, ends)):
        return ",".join(ends)
    return f"(.*[.])?({'|'.join(map(re.escape, ends))})"

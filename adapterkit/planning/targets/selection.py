"""Which modules a job acts on: regexes that are searched in names, --include, --exclude, --skip."""

from collections.abc import Callable, Collection
from dataclasses import dataclass

from adapterkit.patterns import matcher
from adapterkit.planning.targets.values_by_regex import unmatched


@dataclass(frozen=True)
class Selection:
    """Two predicates on names: without `include` all names are selected, without `exclude` none is
    excluded."""

    include: Callable[[str], bool] | None = None
    exclude: Callable[[str], bool] | None = None

    @classmethod
    def of(cls, include: str | None, exclude: str | None) -> "Selection":
        """The selection by these regexes; `Refused` where one does not compile."""
        return cls(
            matcher(include, "--include") if include else None,
            matcher(exclude, "--exclude") if exclude else None,
        )

    def __call__(self, *names: str) -> bool:
        """Whether something is selected that any of these names stands for.

        `Refused` where a regex takes too long."""
        if self.include is not None and not any(map(self.include, names)):
            return False
        return self.exclude is None or not any(map(self.exclude, names))


def selecting(option: str, pattern: str, names: Collection[str]) -> Callable[[str], bool]:
    """The `matcher` of an option that is a pattern; `Refused` where it matches none of these."""
    matches = matcher(pattern, option)
    if not any(map(matches, names)):
        raise unmatched(option, pattern, names, "a module of the model")
    return matches

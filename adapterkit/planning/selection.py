"""Which modules a job acts on: the options --include and --exclude."""

from collections.abc import Callable
from dataclasses import dataclass

from adapterkit.patterns import matcher


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

"""Options REGEX=VALUE, for the modules whose name, or the end of it after a dot, matches:
`--rank-for 'down_proj=16'`. Of several that match a module the first counts, as in PEFT."""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from adapterkit.errors import Problems, Refused, shown
from adapterkit.patterns import matcher, similar_names


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


V = TypeVar("V")
Rule = tuple[str, V]  # a pattern and its value


def read_rules(
    option: str, texts: Iterable[str], value: Callable[[str], V | None], expected: str
) -> list[Rule[V]]:
    """The rules of an option, in their order; `value` is None for a text that spells none.
    `Refused` with all that are no rules."""
    rules: list[Rule[V]] = []
    errors = Problems(where="options")
    for text in texts:
        pattern, _, spelled = text.rpartition("=")
        number = value(spelled) if pattern else None
        if number is None:
            errors.add(f"{option} {shown(text)!r}", expected, "give a regex, = and the value")
            continue
        with errors.collected():
            matcher(pattern, option)
            rules.append((pattern, number))
    Problems(errors).raise_all()
    return rules


def pattern_table(rules: Sequence[Rule[V]]) -> dict[str, V]:
    """Pattern -> value; of two rules of one pattern the first counts."""
    table: dict[str, V] = {}
    for pattern, value in rules:
        table.setdefault(pattern, value)
    return table


def unmatched(option: str, pattern: str, names: Collection[str], expected: str) -> Refused:
    """The refusal of an option whose pattern matches none of these modules."""
    return Refused(
        f"{option} {shown(pattern)!r} matches none",
        expected=expected,
        where=option,
        hint=similar_names(pattern, names) or "check the regex",
    )

"""Options REGEX=VALUE, for the modules whose name, or the end of it after a dot, matches:
`--rank-for 'down_proj=16'`. Of several that match a module the first counts, as in PEFT."""

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TypeVar

from adapterkit.errors import Problems, Refused, shown
from adapterkit.patterns import matcher, similar_names

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
            problem, hint = f"{option} {shown(text)!r}", "give a regex, = and the value"
            errors.add(problem, expected, hint)
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

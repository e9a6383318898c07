"""Options REGEX=VALUE, for the modules whose name, or the end of it after a dot, matches:
`--rank-for down_proj=16`. Of several that match a module the first counts, as in PEFT."""

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, TypeVar

from adapterkit.core.errors import Problems, Refused, shown
from adapterkit.core.patterns import matcher, similar_names
from adapterkit.core.records import Check


def selection(include: str | None, exclude: str | None) -> Callable[..., bool]:
    """Whether something is selected that any of some names stands for: without `include` all is,
    without `exclude` nothing is excluded. `Refused` for a regex that does not compile, and when it
    is asked for one that takes too long."""
    included = matcher(include, "--include") if include else lambda name: True
    excluded = matcher(exclude, "--exclude") if exclude else lambda name: False
    return lambda *names: any(map(included, names)) and not any(map(excluded, names))


def selecting(option: str, pattern: str, names: Collection[str]) -> Callable[[str], bool]:
    """The `matcher` of an option that is a pattern; `Refused` where it matches none of these."""
    matches = matcher(pattern, option)
    if not any(map(matches, names)):
        raise unmatched(option, pattern, names, "a module of the model")
    return matches


V = TypeVar("V")
Rule = tuple[str, V]  # a pattern and its value


def read_rules(
    option: str, texts: Iterable[str], check: Check, format: str = "REGEX=VALUE"
) -> list[Rule[Any]]:
    """The rules of an option, in their order, their values by the check; `format`: as the option
    spells them. `Refused` with all that are no rules."""
    rules: list[Rule[Any]] = []
    errors = Problems(where="options", hint="give a regex, = and the value", code="AK101")
    for text in texts:
        pattern, _, value = text.rpartition("=")
        if not pattern or not check.fits(value):
            errors.add(f"{option} {shown(text)!r}", f"{format}, the value {check.expected}")
            continue
        with errors.collected():
            matcher(pattern, option)
            rules.append((pattern, check.read(value)))
    errors.raise_all()
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
        code="AK104",
    )

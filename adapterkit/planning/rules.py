"""Options REGEX=VALUE, for the modules whose name matches: `--rank-for 'down_proj=16'`."""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from adapterkit.errors import AdapterkitError, Refused, refuse_all, shown
from adapterkit.patterns import matcher, similar_names

V = TypeVar("V")


@dataclass(frozen=True)
class Rule(Generic[V]):
    """One of them."""

    option: str
    text: str  # as it is given
    pattern: str
    matches: Callable[[str], bool]
    value: V

    def unmatched(self, names: Collection[str], expected: str) -> Refused:
        """The refusal of a rule that matches none of these modules."""
        return unmatched(self.option, self.text, self.pattern, names, expected)


def read_rules(
    option: str, texts: Iterable[str], value: Callable[[str], V | None], expected: str
) -> list[Rule[V]]:
    """The rules of an option, in their order; `value` is None for a text that spells none.
    `Refused` with all that are no rules."""
    rules: list[Rule[V]] = []
    errors: list[AdapterkitError] = []
    for text in texts:
        pattern, _, spelled = text.rpartition("=")
        number = value(spelled) if pattern else None
        if number is None:
            problem, hint = f"{option} {shown(text)!r}", "give a regex, = and the value"
            errors.append(Refused(problem, expected=expected, where="options", hint=hint))
            continue
        try:
            rules.append(Rule(option, text, pattern, matcher(pattern, option), number))
        except AdapterkitError as error:
            errors.append(error)
    refuse_all(errors)
    return rules


def pattern_table(rules: Sequence[Rule[V]]) -> dict[str, V]:
    """Pattern -> value; of two rules of one pattern the first counts."""
    table: dict[str, V] = {}
    for rule in rules:
        table.setdefault(rule.pattern, rule.value)
    return table


def last_match(rules: Sequence[Rule[V]], name: str, default: V) -> V:
    """The value for a module: the last rule that matches decides."""
    return next((rule.value for rule in reversed(rules) if rule.matches(name)), default)


def unmatched_rules(
    rules: Iterable[Rule], names: Collection[str], expected: str
) -> list[AdapterkitError]:
    """Refusals of the rules that match none of these modules."""
    return [rule.unmatched(names, expected) for rule in rules if not any(map(rule.matches, names))]


def selecting(
    option: str, pattern: str, names: Collection[str], expected: str = "a module of the model"
) -> Callable[[str], bool]:
    """The `matcher` of an option that is a pattern; `Refused` where it matches none of these."""
    matches = matcher(pattern, option)
    if not any(map(matches, names)):
        raise unmatched(option, pattern, pattern, names, expected)
    return matches


def unmatched(
    option: str, text: str, pattern: str, names: Collection[str], expected: str
) -> Refused:
    """The refusal of an option whose pattern matches none of these modules."""
    return Refused(
        f"{option} {shown(text)!r} matches none",
        expected=expected,
        where=option,
        hint=similar_names(pattern, names) or "check the regex",
    )

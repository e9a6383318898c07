"""Module names in the naming of a format and in that of the model, by an architecture's rules."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache

from adapterkit.formats.library import architectures
from adapterkit.formats.schema import MODEL, Architecture, Rule

PLACE = re.compile(r"\{(\w+)\}")
NUMBER = re.compile(r"[A-Z]")  # the places that stand for a number; others name tables
Values = Mapping[str, str]  # of the places of a pattern


@dataclass(frozen=True)
class Match:
    """A rule that a name fits, and the values of its places."""

    rule: Rule
    values: tuple[tuple[str, str], ...]
    part: int = 0  # which of the rule's modules it is, for a name of the model


class Names:
    """The names of one architecture's component in one naming and style."""

    def __init__(self, architecture: Architecture, component: str, naming: str, style: str):
        self.tables, self.naming, self.style = tables_of(architecture), naming, style
        self.rules = rules_of(architecture, component)
        self._named = [
            (re.compile(self._regex(text, own=True)), rule, part)
            for rule in self.rules
            for part, text in enumerate(self._texts(rule))
        ]
        self._model = [
            (re.compile(self._regex(text, own=False)), rule, part)
            for rule in self.rules
            for part, text in enumerate(rule.model)
        ]

    def _texts(self, rule: Rule) -> tuple[str, ...]:
        """A rule's names in this naming: one, each of its modules', or none."""
        if self.naming == MODEL:
            return rule.model
        return (rule.namings[self.naming],) if self.naming in rule.namings else ()

    def find(self, name: str) -> list[Match]:
        """The rules that a name of a file fits."""
        found = ((pattern.fullmatch(name), rule, part) for pattern, rule, part in self._named)
        own = self.naming != MODEL
        return [
            Match(rule, self._keys(match.groupdict(), own=own), part)
            for match, rule, part in found
            if match
        ]

    def find_model(self, name: str) -> list[Match]:
        """The rules that a module of the model fits, written with dots."""
        return [
            Match(rule, self._keys(m.groupdict(), own=False), part)
            for pattern, rule, part in self._model
            if (m := pattern.fullmatch(name))
        ]

    def text(self, match: Match) -> str | None:
        """The name in a file; None where this naming has none for it."""
        if self.naming == MODEL:
            name = self._filled(match.rule.model[match.part], dict(match.values), own=False)
        elif self.naming in match.rule.namings:
            name = self._filled(match.rule.namings[self.naming], dict(match.values), own=True)
        else:
            return None
        return name.replace(".", "_") if self.style == "underscores" else name

    def models(self, match: Match) -> list[str]:
        """The modules of the model that a name of a file stands for."""
        parts = (match.rule.model[match.part],) if self.naming == MODEL else match.rule.model
        return [self._filled(text, dict(match.values), own=False) for text in parts]

    def _keys(self, values: Values, *, own: bool) -> tuple[tuple[str, str], ...]:
        """Values of places, of tables their keys; `own`: as a name in this naming has them."""
        return tuple((place, self._key(place, value, own)) for place, value in values.items())

    def _key(self, place: str, value: str, own: bool) -> str:
        """The key of a table's text in a name; a number as it is."""
        if NUMBER.fullmatch(place):
            return value
        for key, text in self.tables[place].items():
            if value == _in_style(key if own else text, self.style if own else "dots"):
                return key
        return next(
            key for key, text in self.tables[place].items() if value == _in_style(text, self.style)
        )

    def _filled(self, text: str, values: Values, *, own: bool) -> str:
        def fill(place: re.Match) -> str:
            value = values[place[1]]
            return value if own or NUMBER.fullmatch(place[1]) else self.tables[place[1]][value]

        return PLACE.sub(fill, text)

    def _regex(self, text: str, *, own: bool) -> str:
        """The pattern of a rule's text; `own`: in this naming and style, else the model's."""
        style = self.style if own else "dots"
        own = own and self.naming != MODEL
        parts: list[str] = []
        seen: set[str] = set()
        for index, piece in enumerate(PLACE.split(text)):
            if index % 2 == 0:
                parts.append(_styled(piece, style))
            elif piece in seen:
                parts.append(f"(?P={piece})")
            else:
                seen.add(piece)
                parts.append(f"(?P<{piece}>{self._values(piece, style, own)})")
        return "".join(parts)

    def _values(self, place: str, style: str, own: bool) -> str:
        if NUMBER.fullmatch(place):
            return r"\d+"
        table = self.tables[place]
        return "|".join(_styled(text, style) for text in (table if own else table.values()))


def _styled(text: str, style: str) -> str:
    return re.escape(_in_style(text, style))


def _in_style(text: str, style: str) -> str:
    return text.replace(".", "_") if style == "underscores" else text


def tables_of(architecture: Architecture) -> dict[str, Mapping[str, str]]:
    """The tables of an architecture and of those that it includes."""
    included = {name for words in architecture.components.values() for name in words.include}
    tables: dict[str, Mapping[str, str]] = {}
    for name in sorted(included):
        tables |= tables_of(architectures()[name])
    return tables | dict(architecture.tables)


def rules_of(architecture: Architecture, component: str) -> list[Rule]:
    """A component's rules, those of included architectures too."""
    words = architecture.components.get(component)
    if words is None:
        return []
    included = [
        rule
        for name in words.include
        for part in architectures()[name].components
        for rule in rules_of(architectures()[name], part)
    ]
    return [*words.rules, *included]


@cache
def names_of(architecture: str, component: str, naming: str, style: str = "dots") -> Names:
    """The names of an architecture's component; made once."""
    return Names(architectures()[architecture], component, naming, style)


def fitting(modules: Iterable[tuple[str, str]], among: Iterable[str]) -> list[str]:
    """The architectures in whose components all these (component, name of the model) are."""
    pairs = list(modules)
    return [
        name
        for name in among
        if all(
            component in architectures()[name].components
            and names_of(name, component, MODEL).find_model(module)
            for component, module in pairs
        )
    ]

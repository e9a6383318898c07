"""Map module names between a format's naming and the model's, by an architecture's rules."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache, reduce
from operator import or_
from typing import NamedTuple

from adapterkit.adapters.formats.library import architectures
from adapterkit.adapters.formats.schema import MODEL, Architecture, ComponentSchema, NamingRule

PLACE = re.compile(r"\{(\w+)\}")
NUMBER = re.compile(r"[A-Z]")  # placeholders of numbers; others name tables
Values = Mapping[str, str]  # of the places of a pattern
Tables = Mapping[str, Mapping[str, str]]
# of any of the names; of each, with its rule and the place among the rule's modules
_Patterns = tuple[re.Pattern[str], list[tuple[re.Pattern[str], NamingRule, int]]]


class Size(NamedTuple):
    """A module of the model, with the rows and inputs of its weight."""

    module: str
    rows: Fraction  # of a part of fused rows, by its share
    inputs: int


@dataclass(frozen=True)
class Match:
    """A rule that matches a name, and the values of its placeholders."""

    rule: NamingRule
    values: tuple[tuple[str, str], ...]
    part: int = 0  # which of the rule's modules it is, for a name of the model


class ComponentNames:
    """The names of one architecture's component in one naming and style."""

    def __init__(self, architecture: Architecture, component: str, naming: str, style: str):
        self.naming, self.style = naming, style
        self.rules = rules_of(architecture, component)
        words = architecture.components.get(component, ComponentSchema())
        self.inside = words.inside.get(naming, "")
        self.renames = renames_of(architecture, component)
        self._named = self._patterns(self._texts, own=True)
        self._model = self._patterns(lambda rule: rule.model, own=False)

    def _patterns(self, texts: Callable[[NamingRule], Iterable[str]], *, own: bool) -> _Patterns:
        """The patterns of the rules' names, with one pattern for all of them. Most names fit no
        architecture except their own, and one pattern shows that faster than a hundred."""
        each = [
            (re.compile(self._regex(text, rule.tables, own=own)), rule, part)
            for rule in self.rules
            for part, text in enumerate(texts(rule))
        ]
        loose = (re.sub(r"\(\?P=\w+\)", ".+", pattern.pattern) for pattern, _, _ in each)
        any_of = "|".join(re.sub(r"\(\?P<\w+>", "(?:", text) for text in loose)
        return re.compile(any_of or r"(?!)"), each

    def _texts(self, rule: NamingRule) -> tuple[str, ...]:
        """A rule's names in this naming: one, one per module, or none."""
        if self.naming == MODEL:
            return rule.model
        text = self._text(rule)
        return () if text is None else (text,)

    def _text(self, rule: NamingRule) -> str | None:
        """A rule's name in this naming: empty if it is no module there, None if it has none."""
        text = rule.namings.get(self.naming)
        return self.inside + text if text else text

    def unlisted(self, module: str) -> str:
        """The name in a file of a module of the model that no rule lists."""
        return in_style(self.inside + self.in_rules(module), self.style)

    def in_rules(self, module: str) -> str:
        """A module of the model as the rules spell it."""
        for spelling, replacement in self.renames.items():
            module = re.sub(spelling, replacement, module)
        return module

    def find(self, name: str) -> list[Match]:
        """The rules that match a name in a file."""
        if self.naming == MODEL:  # a module may be in several rules, each for other namings
            return self._matches(name, self._named, own=False)[:1]
        return self._matches(name, self._named, own=True)

    def find_model(self, name: str) -> list[Match]:
        """The rules that match a module of the model, written with dots."""
        return self._matches(self.in_rules(name), self._model, own=False)

    def _matches(self, name: str, patterns: _Patterns, *, own: bool) -> list[Match]:
        any_of, each = patterns
        if not any_of.fullmatch(name):
            return []
        return [
            Match(rule, self._keys(m.groupdict(), rule.tables, own=own), part)
            for pattern, rule, part in each
            if (m := pattern.fullmatch(name))
        ]

    def named(self, module: str) -> tuple[Match, str] | None:
        """The rule that names a module of the model in a file, and the name."""
        texts = ((match, self.text(match)) for match in self.find_model(module))
        return next(((match, text) for match, text in texts if text is not None), None)

    def text(self, match: Match) -> str | None:
        """The name in a file; None if this naming has none for it."""
        if self.naming == MODEL:
            name = _filled(match.rule.model[match.part], match, own=False)
        elif (text := self._text(match.rule)) is not None:
            name = _filled(text, match, own=True)
        else:
            return None
        return in_style(name, self.style)

    def stacked(self, rule: NamingRule) -> str | None:
        """The number missing from a rule's name: one tensor stores all its modules."""
        if self.naming == MODEL or self.naming not in rule.namings:
            return None
        own = set(PLACE.findall(rule.namings[self.naming]))
        return next((place for place in PLACE.findall(rule.model[0]) if place not in own), None)

    def models(self, match: Match) -> list[str]:
        """The modules of the model that a name of a file stands for."""
        parts = (match.rule.model[match.part],) if self.naming == MODEL else match.rule.model
        return [_filled(text, match, own=False) for text in parts]

    def _keys(self, values: Values, tables: Tables, *, own: bool) -> tuple[tuple[str, str], ...]:
        """Values of placeholders, or their keys in tables. `own`: as in a name in this naming."""
        return tuple(
            (place, value if NUMBER.fullmatch(place) else self._key(tables[place], value, own))
            for place, value in values.items()
        )

    def _key(self, table: Mapping[str, str], value: str, own: bool) -> str:
        """The key of a table's text in a name."""
        for key, text in table.items():
            if value == in_style(key if own else text, self.style if own else "dots"):
                return key
        return next(key for key, text in table.items() if value == in_style(text, self.style))

    def _regex(self, text: str, tables: Tables, *, own: bool) -> str:
        """The pattern of a rule's text; `own`: in this naming and style, else the model's."""
        style = self.style if own else "dots"
        own = own and self.naming != MODEL
        parts: list[str] = []
        seen: set[str] = set()
        for index, piece in enumerate(PLACE.split(text)):
            if index % 2 == 0:
                parts.append(re.escape(in_style(piece, style)))
            elif piece in seen:
                parts.append(f"(?P={piece})")
            else:
                seen.add(piece)
                parts.append(f"(?P<{piece}>{_values(piece, tables, style, own)})")
        return "".join(parts)


def _values(place: str, tables: Tables, style: str, own: bool) -> str:
    if NUMBER.fullmatch(place):
        return r"\d+"
    table = tables[place]
    return "|".join(re.escape(in_style(text, style)) for text in (table if own else table.values()))


def _filled(text: str, match: Match, *, own: bool) -> str:
    """A pattern with the values of a match filled in."""
    values = dict(match.values)

    def fill(place: re.Match) -> str:
        value = values[place[1]]
        is_own = own or NUMBER.fullmatch(place[1])
        return value if is_own else match.rule.tables[place[1]][value]

    return PLACE.sub(fill, text)


def in_style(text: str, style: str) -> str:
    """A name with dots in the style of a format."""
    return text.replace(".", "_") if style == "underscores" else text


def rules_of(architecture: Architecture, component: str) -> list[NamingRule]:
    """A component's rules and those of included architectures: of the same component, or of all
    components if none has that name. The architecture's own tables override included ones."""
    words = architecture.components.get(component)
    if words is None:
        return []
    rules = [replace(rule, tables=architecture.tables) for rule in words.rules]
    for name in words.include:
        own = architectures()[name].components
        for part in [component] if component in own else own:
            rules += [
                replace(rule, tables={**rule.tables, **architecture.tables})
                for rule in rules_of(architectures()[name], part)
            ]
    return rules


def renames_of(architecture: Architecture, component: str) -> dict[str, str]:
    """A component's table, and those of included architectures."""
    words = architecture.components.get(component, ComponentSchema())
    included = [renames_of(architectures()[name], component) for name in words.include]
    return reduce(or_, included, dict(words.renames))


def kernel_of(among: Sequence[str], component: str, module: str) -> tuple[int, ...] | None:
    """The kernel of a module's convolution, () for a linear layer; None without architectures."""
    for name in among:
        for pattern, kernel in _kernels(architectures()[name], component):
            if re.search(pattern, module):
                return kernel
    return () if among else None


def _kernels(architecture: Architecture, component: str) -> list[tuple[str, tuple[int, ...]]]:
    """A component's table, its own entries before those of included architectures."""
    words = architecture.components.get(component)
    if words is None:
        return []
    included = (pair for n in words.include for pair in _kernels(architectures()[n], component))
    return [*words.kernels.items(), *included]


@cache
def names_of(architecture: str, component: str, naming: str, style: str = "dots") -> ComponentNames:
    """The names of an architecture's component; made once."""
    return ComponentNames(architectures()[architecture], component, naming, style)


@cache
def first_words(architecture: str, component: str, naming: str) -> frozenset[str]:
    """The parts of a file's names before their first dot."""
    words: set[str] = set()
    for rule in rules_of(architectures()[architecture], component):
        texts = rule.model if naming == MODEL else (rule.namings.get(naming, ""),)
        for word in (text.partition(".")[0] for text in texts if text):
            place = PLACE.search(word)
            table = rule.tables[place[1]] if place else {"": ""}
            rows = table.values() if naming == MODEL else table
            words |= {PLACE.sub(row, word).partition(".")[0] for row in rows}
    return frozenset(words)


def likely(sizes: Mapping[str, Sequence[Size]], metadata: Mapping[str, str]) -> list[str]:
    """The architectures with the best evidence. Rows and numbers of blocks rule some out; then
    metadata, widths and numbers of blocks are compared. A criterion that rules out every
    architecture is ignored. `sizes`: the modules by the names of each."""
    fits = list(sizes)
    tests: tuple[Callable[[str], list[bool]], ...] = (
        lambda name: [
            *_by_rows(name, sizes[name]),
            *(count <= max(own) for count, own in _blocks(name, sizes[name])),
        ],
        lambda name: _by_metadata(name, metadata),
        lambda name: _by_width(name, sizes[name]),
    )
    for test in tests:
        fits = [name for name in fits if all(test(name))] or fits
    evidence = {
        name: (
            all(own) if (own := _by_metadata(name, metadata)) else False,
            all(own) if (own := _by_width(name, sizes[name])) else False,
            any(count in own for count, own in _blocks(name, sizes[name])),
        )
        for name in fits
    }
    best = max(evidence.values(), default=None)
    return [name for name in fits if evidence[name] == best]


def _by_metadata(name: str, metadata: Mapping[str, str]) -> list[bool]:
    hints = architectures()[name].detect.metadata
    return [p.search(metadata[key]) is not None for key, p in hints.items() if key in metadata]


def _by_width(name: str, sizes: Sequence[Size]) -> list[bool]:
    return [
        one.inputs in expected
        for pattern, expected in architectures()[name].detect.shapes.items()
        for one in sizes
        if re.search(pattern, one.module)
    ]


def _by_rows(name: str, sizes: Sequence[Size]) -> list[bool]:
    return [
        one.rows * inputs == one.inputs * rows
        for pattern, (rows, inputs) in architectures()[name].detect.ratios.items()
        for one in sizes
        if re.search(pattern, one.module)
    ]


def _blocks(name: str, sizes: Sequence[Size]) -> Iterator[tuple[int, tuple[int, ...]]]:
    """The least number of blocks in each stack, and the possible numbers."""
    for stack, expected in architectures()[name].detect.blocks.items():
        pattern = re.compile(re.escape(stack) + r"\.(\d+)\.")
        numbers = [int(m[1]) for one in sizes if (m := pattern.match(one.module))]
        if numbers:
            yield max(numbers) + 1, expected


def of_type(among: Iterable[str], model_type: str | None) -> list[str]:
    """The architectures that declare this model type."""
    return [name for name in among if model_type in architectures()[name].detect.models]


def has_modules(architecture: str, modules: Iterable[tuple[str, str]]) -> bool:
    """True if an architecture has all these (component, name in the model)."""
    components = architectures()[architecture].components
    return all(
        component in components and names_of(architecture, component, MODEL).find_model(module)
        for component, module in modules
    )

"""Regular expressions from outside (configs of strangers, the command line), matched with a time
limit; options REGEX=VALUE, for the modules whose name, or the end of it after a dot, matches:
`--rank-for down_proj=16`. Of several that match a module the first counts, as in PEFT."""

import math
import re
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from typing import Any, NoReturn, TypeVar

from adapterkit.core.errors import Problems, Refused, did_you_mean, shown
from adapterkit.core.records import Check

MAX_LENGTH = 1000
# characters that a pattern may stand for once its {counts} are written out, as `regex` does in
# memory
MAX_EXPANSION = 100_000
TIMEOUT = 1.0  # seconds for one name
TOTAL_TIMEOUT = 3.0  # seconds for all the names that one pattern is matched with
PLAIN = re.compile(r"\^?[\w.\-]*\$?")  # nothing that could backtrack
# `regex` reads {e<=2} as "with two errors", `re` as these characters
FUZZY = re.compile(r"(?<!\\)\{(?!\d*(,\d*)?\})")
V = TypeVar("V")
Rule = tuple[str, V]  # a pattern and its value


def matcher(pattern: str, where: str, wrap: str = "{}") -> Callable[[str], bool]:
    """`re.search` of the pattern within `wrap`. Raises `Refused` for one that does not compile, and
    when it is matched for one that takes over a second."""
    if len(pattern) > MAX_LENGTH:
        raise Refused(
            f"a pattern of {len(pattern)} characters",
            expected=f"at most {MAX_LENGTH}",
            where=where,
            hint="shorten it",
            code="AK104",
        )
    whole = wrap.replace("{}", pattern)
    if PLAIN.fullmatch(pattern):
        return partial(_matches, re.compile(whole))
    return _TimedPattern(pattern, whole, where)


def _matches(pattern: re.Pattern, text: str) -> bool:
    return pattern.search(text) is not None


def similar_names(pattern: str, names: Iterable[str]) -> str:
    """`did_you_mean` for a pattern that matches none of the dotted names: its unknown words."""
    words = re.findall(r"[^\W\d]\w+", re.sub(r"\\[A-Za-z]", " ", pattern))
    known = {part for name in names for part in name.split(".") if not part.isdigit()}
    return did_you_mean((word for word in words if word not in known), sorted(known))


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


class _TimedPattern:
    """A pattern that may backtrack, matched with a time limit; not again once that has passed."""

    def __init__(self, pattern: str, whole: str, where: str):
        # one of transformers' own dependencies; the standard library's has no time limit
        import regex

        self.pattern, self.where, self.spent = pattern, where, 0.0
        try:
            _check(pattern)
            self.compiled = regex.compile(whole)
        except (re.error, regex.error, ValueError, OverflowError, RecursionError) as error:
            raise Refused(
                f"pattern {shown(pattern)!r}: {shown(error)}",
                expected="a regular expression",
                where=where,
                hint="fix it",
                code="AK104",
            ) from error

    def __call__(self, text: str) -> bool:
        if self.spent > TOTAL_TIMEOUT:
            self._refuse()
        began = time.monotonic()
        try:
            return self.compiled.search(text, timeout=TIMEOUT) is not None
        except TimeoutError:
            self.spent = TOTAL_TIMEOUT  # the names to come are refused without another try
            self._refuse()
        finally:
            self.spent += time.monotonic() - began

    def _refuse(self) -> NoReturn:
        raise Refused(
            f"pattern {shown(self.pattern)!r} takes seconds on the names of modules",
            expected="a pattern without nested repeats",
            where=self.where,
            hint="write it without nested repeats",
            code="AK104",
        ) from None


def _check(pattern: str) -> None:
    """`re.error` or `ValueError` for what the standard library, which PEFT asks, reads otherwise or
    not at all."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        re.compile(pattern)
    if FUZZY.search(pattern):
        raise ValueError("braces that count nothing")
    if (
        len(pattern) * math.prod(max(1, int(n)) for n in re.findall(r"\{(\d{1,9})", pattern))
        > MAX_EXPANSION
    ):
        raise ValueError("counts that are too large")

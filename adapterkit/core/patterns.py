"""Regular expressions from outside (configs of strangers, the command line), matched with a time
limit; and options REGEX=VALUE for modules whose name, or the end of it after a dot, matches:
`--rank-for down_proj=16`. The first match wins, as in PEFT."""

import math
import re
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NoReturn, TypeVar

from adapterkit.core.errors import Problems, Refused, did_you_mean, shown
from adapterkit.core.records import Check

MAX_LENGTH = 1000
# characters that a pattern may stand for once its {counts} are written out, as `regex` does in
# memory
MAX_EXPANSION = 100_000
TIMEOUT = 1.0  # seconds for one name, of the processor, as `regex` counts them
TOTAL_TIMEOUT = 3.0  # for all the names that one pattern is matched with
PLAIN = re.compile(r"\^?[\w.\-]*\$?")  # cannot backtrack
# `regex` reads {e<=2} as "with two errors", `re` as these characters
FUZZY = re.compile(r"(?<!\\)\{(?!\d*(,\d*)?\})")
MODULES = "list the names of the modules\nadapterkit inspect BASE --modules"  # a hint
V = TypeVar("V")
Rule = tuple[str, V]  # a pattern and its value


def matcher(pattern: str, where: str, wrap: str = "{}") -> Callable[[str], bool]:
    """Return `re.search` of the pattern within `wrap`. It is `Refused` if it does not compile, or
    later, when a match takes over a second of processor time."""
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
    """Return `did_you_mean` for the unknown words of a pattern that matches no dotted name."""
    words = re.findall(r"[^\W\d]\w+", re.sub(r"\\[A-Za-z]", " ", pattern))
    known = {part for name in names for part in name.split(".") if not part.isdigit()}
    return did_you_mean((word for word in words if word not in known), sorted(known))


def read_rules(
    option: str, texts: Iterable[str], check: Check, format: str = "REGEX=VALUE"
) -> list[Rule[Any]]:
    """Return an option's rules in order, with checked values; `format` is the option's spelling.
    `Refused` lists every text that is not a rule."""
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
    """Return pattern -> value; the first rule of a pattern wins."""
    table: dict[str, V] = {}
    for pattern, value in rules:
        table.setdefault(pattern, value)
    return table


class _TimedPattern:
    """A pattern that may backtrack, matched with a time limit; it is not tried again after a
    timeout."""

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
                hint="correct the pattern: a name such as q_proj is one, too",
                code="AK104",
            ) from error

    def __call__(self, text: str) -> bool:
        if self.spent > TOTAL_TIMEOUT:
            self._refuse()
        began = time.thread_time()
        try:
            return self.compiled.search(text, timeout=TIMEOUT) is not None
        except TimeoutError:
            self.spent = TOTAL_TIMEOUT  # later names are refused without another try
            self._refuse()
        finally:
            self.spent += time.thread_time() - began

    def _refuse(self) -> NoReturn:
        raise Refused(
            f"pattern {shown(self.pattern)!r} takes seconds on the names of modules",
            expected="a pattern without nested repeats",
            where=self.where,
            hint="write it without nested repeats",
            code="AK104",
        ) from None


def _check(pattern: str) -> None:
    """Raise `re.error` or `ValueError` for syntax that the standard library, which PEFT uses, reads
    differently or not at all."""
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

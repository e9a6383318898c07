"""Regular expressions from outside (configs of strangers, the command line), matched with a time
limit."""

import math
import re
import time
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import NoReturn

from adapterkit.core.errors import Refused, did_you_mean, shown

MAX_LENGTH = 1000
# characters that a pattern may stand for once its {counts} are written out, as `regex` does in
# memory
MAX_EXPANSION = 100_000
TIMEOUT = 1.0  # seconds for one name
TOTAL_TIMEOUT = 3.0  # seconds for all the names that one pattern is matched with
PLAIN = re.compile(r"\^?[\w.\-]*\$?")  # nothing that could backtrack
# `regex` reads {e<=2} as "with two errors", `re` as these characters
FUZZY = re.compile(r"(?<!\\)\{(?!\d*(,\d*)?\})")


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

"""Refuse names of modules, and patterns for them, that match nothing."""

import re
from collections.abc import Collection

from adapterkit.core.errors import Refused, shown
from adapterkit.core.patterns import MODULES, matcher, similar_names

NAME = re.compile(r"[\w.-]+")  # no regular expression: a dot belongs to the name


def unmatched(option: str, pattern: str, names: Collection[str], expected: str) -> Refused:
    """Return the refusal of an option whose pattern matches none of these modules."""
    return Refused(
        f"{option} {shown(pattern)!r} matches none",
        expected=expected,
        where="options" if option.startswith("--") else option,
        hint=_wider(pattern, names) or similar_names(pattern, names) or MODULES,
        code="AK104",
    )


def _wider(entry: str, names: Collection[str]) -> str:
    """A hint for the name of a module around those that could be meant, or for a regular expression
    that matches only the inside of a name; "" for any other."""
    if any(f".{entry}." in f".{name}" for name in names):
        return f'give ".*{entry}.*" for the modules inside it'
    if NAME.fullmatch(entry) or not any(map(matcher(entry, ""), names)):
        return ""
    return f'give "{shown(_unanchored(entry))}" for the names that contain it'


def _unanchored(pattern: str) -> str:
    """The regular expression for whole names that matches the names in which this one is found."""
    if "|" in pattern:
        return f".*({pattern}).*"
    start = pattern.removeprefix("^") if pattern.startswith("^") else f".*{pattern}"
    is_end = pattern.endswith("$") and not pattern.endswith(r"\$")
    return start.removesuffix("$") if is_end else f"{start}.*"

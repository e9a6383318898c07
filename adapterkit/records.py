"""One way from JSON, TOML or a caller to checked values.

A `Check` says what a value is to be, and makes it that. `check_of` gives the check of an
annotation: int, float, bool, str, Any, Literal, tuples and maps of these, `re.Pattern`, records,
`X | None`; a record is a frozen dataclass whose fields have the checks of their annotations, or
those of `checked`. `read` gives the record of a table. All that is wrong is refused together, each
with its place, what was found and what is expected.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from adapterkit.errors import AdapterkitError, Problems, Refused, did_you_mean, shown

R = TypeVar("R")
T = TypeVar("T")
MOST = 2**31 - 1  # no whole number is larger, but a count of bytes


@dataclasses.dataclass(frozen=True)
class Check:
    """What a value is to be, as a text and as a function: from the value to what is used, or
    `ValueError`, or errors with reasons of their own. `words`: those that it may be."""

    expected: str
    read: Callable[[Any], Any]
    words: tuple[str, ...] = ()

    def fits(self, value: object) -> bool:
        """Whether a value is what is expected."""
        try:
            self.read(value)
        except (ValueError, TypeError, AdapterkitError):
            return False
        return True


def checked(default: T, check: Check) -> T:
    """A field of a record with that default, and a check that its annotation does not tell."""
    about: dict[str, Any] = {"metadata": {"check": check}}
    about |= {"default_factory": dict} if default == {} else {"default": default}
    return dataclasses.field(**about)


# -- reading ---------------------------------------------------------------------------------------


def read(
    record: type[R],
    table: object,
    where: str,
    *,
    hint: str,
    name: Callable[[str], str] = str,
    kind: type[AdapterkitError] = Refused,
) -> R:
    """The record of a table, whose place is `where`; `name`: what the user calls a field."""
    errors = Problems()
    value = _inside(check_of(record), table, "", errors)
    Problems(placed(errors, where, hint=hint, name=name, kind=kind)).raise_all()
    return value


def problems(
    check: Check, value: object, where: str, *, hint: str, kind: type[AdapterkitError] = Refused
) -> list[AdapterkitError]:
    """What is wrong with a value, whose place is `where`."""
    errors = Problems()
    _inside(check, value, "", errors)
    return placed(errors, where, hint=hint, kind=kind)


def values(
    checks: Mapping[str, Check], table: Mapping[str, Any], errors: Problems
) -> dict[str, Any]:
    """What the checks make of the values of these names, None where there is none; what is wrong
    goes to `errors`, to be `placed`."""
    found: dict[str, Any] = {}
    for name, check in checks.items():
        count = len(errors)
        value = _inside(check, table.get(name), f".{name}", errors)
        if len(errors) == count:
            found[name] = value
    return found


def placed(
    errors: Iterable[AdapterkitError],
    where: str,
    *,
    hint: str,
    name: Callable[[str], str] = str,
    kind: type[AdapterkitError] = Refused,
) -> list[AdapterkitError]:
    """Errors of values as the user sees them: the place in the table, then what is wrong."""
    result = []
    for error in errors:
        place = re.sub(r"^\.(\w+)", lambda match: name(match[1]), error.where)
        problem = (place + error.problem).removeprefix(" = ")
        hint = error.hint or hint
        result.append(kind(problem, expected=error.expected, where=where, hint=hint))
    return result


def _inside(check: Check, value: object, place: str, errors: Problems) -> Any:
    """What a check makes of a value at that place of a list or table."""
    try:
        return check.read(value)
    except AdapterkitError as error:
        for one in getattr(error, "errors", (error,)):
            one.problem = one.problem if one.where else f": {one.problem}"
            one.where = place + one.where
            errors.append(one)
    except (ValueError, TypeError):
        hint = did_you_mean([value], check.words) if isinstance(value, str) else ""
        found = f" = {shown(repr(value))}"
        errors.add(found, check.expected, hint, where=place)
    return None


# -- checks ----------------------------------------------------------------------------------------


def test(expected: str, fits: Callable[[Any], object]) -> Check:
    """A value as it is, where it fits."""

    def read(value: Any) -> Any:
        if not fits(value):
            raise ValueError
        return value

    return Check(expected, read)


def of_type(expected: str, *types: type) -> Check:
    """A value of these types, as it is; true and false are no numbers."""
    return test(expected, lambda value: type(value) in types)


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _integer(value: Any) -> int:
    if not _is_finite(value) or int(value) != value:
        raise ValueError
    return int(value)


def _compiled(value: Any) -> re.Pattern[str]:
    try:
        return re.compile(value)
    except re.error as error:
        raise Refused(str(error), expected="a regular expression") from error


ANYTHING = Check("anything", lambda value: value)
FLAG = of_type("true or false", bool)
TEXT = test("a text", lambda value: isinstance(value, str))
NAME = test("a name", lambda value: isinstance(value, str) and value)
INTEGER = Check("a whole number", _integer)
FINITE = test("a finite number", _is_finite)
POSITIVE_INT = test(
    "a whole number above 0", lambda value: type(value) is int and 0 < value <= MOST
)
NON_NEGATIVE_INT = test("a whole number", lambda value: type(value) is int and 0 <= value <= MOST)
TABLE = of_type("a table", dict)
PATTERN = Check("a regular expression", _compiled)


def optional(check: Check) -> Check:
    """The same, or None."""
    return dataclasses.replace(
        check, read=lambda value: None if value is None else check.read(value)
    )


def one_of(*words: object) -> Check:
    """One of these values; of an enum its text."""
    texts = tuple(word for word in words if isinstance(word, str))
    return Check(", ".join(map(str, words)), lambda value: words[words.index(value)], texts)


def list_of(check: Check, expected: str = "a list") -> Check:
    """A list, each of its items as the check makes it, as a tuple; a set in the order of texts."""

    def read(value: Any) -> tuple[Any, ...]:
        if isinstance(value, set | frozenset):
            value = sorted(value, key=str)
        if not isinstance(value, Sequence) or isinstance(value, str | bytes):
            raise ValueError
        errors = Problems()
        items = tuple(_inside(check, one, f"[{i}]", errors) for i, one in enumerate(value))
        errors.raise_all()
        return items

    return Check(expected, read)


def one_or_several(check: Check) -> Check:
    """A list, of which one item may stand alone."""
    several = list_of(check)
    alone = lambda value: [value] if isinstance(value, str | int) else value
    return Check(f"{check.expected}, or a list", lambda value: several.read(alone(value)))


def table_of(key: Check, check: Check) -> Check:
    """A table, its keys and its values as the checks make them."""

    def read(value: Any) -> dict[Any, Any]:
        if not isinstance(value, Mapping):
            raise ValueError
        errors = Problems()
        table = {
            _inside(key, name, f".{name}", errors): _inside(check, one, f".{name}", errors)
            for name, one in value.items()
        }
        errors.raise_all()
        return table

    return Check("a table", read)


def entries(checks: Mapping[str, Check]) -> Check:
    """A table that has these words, whatever else it has, as it is."""

    def read(table: Any) -> Any:
        if not isinstance(table, Mapping):
            raise ValueError
        errors = Problems(_missing(checks, checks.keys() - table.keys()))
        values({name: check for name, check in checks.items() if name in table}, table, errors)
        Problems(errors).raise_all()
        return table

    return Check("a table", read)


def _missing(checks: Mapping[str, Check], names: Iterable[str]) -> list[AdapterkitError]:
    return [
        Refused(" is missing", expected=checks[name].expected, where=f".{name}", hint="give it")
        for name in sorted(names)
    ]


def also(check: Check, expected: str, fits: Callable[[Any], object]) -> Check:
    """What a check makes of a value, where it fits, too."""
    second = test(expected, fits)
    return Check(expected, lambda value: second.read(check.read(value)))


def _either(checks: Sequence[Check]) -> Check:
    """What the first of the checks that a value fits makes of it."""

    def read(value: Any) -> Any:
        for check in checks:
            if check.fits(value):
                return check.read(value)
        raise ValueError

    return Check(" or ".join(check.expected for check in checks), read)


def _record_of(record: Any) -> Check:
    """A table whose words are fields of the record."""

    def read(table: Any) -> Any:
        if not isinstance(table, Mapping):
            raise ValueError
        checks = checks_of(record)
        errors = Problems(_missing(checks, required(record) - table.keys()))
        for name in sorted(map(str, table.keys() - checks.keys())):
            hint = did_you_mean([name], checks) or "remove it"
            expected = ", ".join(checks) or "nothing"
            errors.append(Refused(" is unknown", expected=expected, where=f".{name}", hint=hint))
        given = {name: one for name, one in table.items() if name in checks}
        found = {
            name: _inside(checks[name], one, f".{name}", errors) for name, one in given.items()
        }
        Problems(errors).raise_all()
        return record(**found)

    return Check("a table", read)


@cache
def checks_of(record: Any) -> dict[str, Check]:
    """The check of each field of a record."""
    hints = get_type_hints(record)
    return {
        one.name: one.metadata.get("check") or check_of(hints[one.name])
        for one in dataclasses.fields(record)
    }


def required(record: Any) -> set[str]:
    """The fields of a record that have no default."""
    missing = dataclasses.MISSING
    return {
        one.name
        for one in dataclasses.fields(record)
        if one.default is missing and one.default_factory is missing
    }


PLAIN: dict[Any, Check] = {
    int: INTEGER, float: FINITE, bool: FLAG, str: TEXT, dict: TABLE, Any: ANYTHING,
    re.Pattern: PATTERN,
}  # fmt: skip


@cache
def check_of(kind: Any) -> Check:
    """The check of an annotation."""
    origin, arguments = get_origin(kind), get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _record_of(kind)
    if origin in (Union, UnionType):
        checks = [check_of(one) for one in arguments if one is not type(None)]
        check = checks[0] if len(checks) == 1 else _either(checks)
        return optional(check) if type(None) in arguments else check
    if origin is Literal:
        return one_of(*arguments)
    if origin is tuple and arguments[-1] is not ...:
        size = len(arguments)
        return also(list_of(check_of(arguments[0])), f"{size} values", lambda v: len(v) == size)
    if origin is tuple:
        return one_or_several(check_of(arguments[0]))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return table_of(*map(check_of, arguments))
    return PLAIN[kind if origin is None else origin]

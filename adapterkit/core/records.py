"""Conversion of JSON, TOML or Python arguments to checked values.

A `Check` describes the expected value and converts to it. `check_of` returns the check of an
annotation: int, float, bool, str, Any, Literal, tuples and maps of these, `re.Pattern`, records, `X
| None`. A record is a frozen dataclass; its fields have the checks of their annotations, or those
of `checked_field`. `read` returns the record of a table. All errors are refused together, each with
its place, the value found and the value expected."""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from adapterkit.core.errors import AdapterkitError, Problems, Refused, did_you_mean, shown

R = TypeVar("R")
T = TypeVar("T")
Json = dict[str, Any]  # an object of JSON, as it is made or changed
Settings = Mapping[str, Any]  # a table that was read from JSON, YAML or TOML
MOST = 2**31 - 1  # the largest integer, except for counts of bytes


@dataclasses.dataclass(frozen=True)
class Check:
    """A description of the expected value, and a function that converts to it or raises
    `ValueError` or errors with their own reasons.

    `words`: the allowed values, or a function that returns them if they are known only on use;
    `hint`: the fix if none of them is similar. For options: `kind` decides how a text is read on
    the command line, in plan files and pipelines (text, flag, integer, number, targets, settings;
    for inputs file, source, sources), `several` makes it a list, `example` is a valid value."""

    expected: str
    read: Callable[[Any], Any]
    words: Sequence[str] | Callable[[], Iterable[str]] = ()
    hint: str = ""
    kind: str = "text"
    several: bool = False
    example: str = ""

    def fits(self, value: object) -> bool:
        """Return whether a value passes the check."""
        try:
            self.read(value)
        except (ValueError, TypeError, AdapterkitError):
            return False
        return True

    @property
    def is_source(self) -> bool:
        return self.kind in ("source", "sources")


def checked_field(default: T, check: Check) -> T:
    """Declare a field of a record with a default and a check beyond its annotation."""
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
    """Return the record of a table, whose place is `where`; `name` returns the user's word for a
    field."""
    errors = Problems()
    value = inside(check_of(record), table, "", errors)
    Problems(placed(errors, where, hint=hint, name=name, kind=kind)).raise_all()
    return value


def problems(
    check: Check, value: object, where: str, *, hint: str, kind: type[AdapterkitError] = Refused
) -> list[AdapterkitError]:
    """Return the errors of a value, whose place is `where`."""
    errors = Problems()
    inside(check, value, "", errors)
    return placed(errors, where, hint=hint, kind=kind)


def values(
    checks: Mapping[str, Check], table: Mapping[str, Any], errors: Problems
) -> dict[str, Any]:
    """Return the converted values of these names, None if missing; errors are added to `errors`, to
    be `placed`."""
    found: dict[str, Any] = {}
    for name, check in checks.items():
        count = len(errors)
        value = inside(check, table.get(name), f".{name}", errors)
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
    """Return errors of values as the user sees them: the place in the table, then the problem."""
    result = []
    for error in errors:
        is_within = error.where[:1] in ("", ".", "[")
        place = re.sub(r"^\.(\w+)", lambda match: name(match[1]), error.where)
        problem = (place * is_within + error.problem).removeprefix(" = ")
        own, code = error.hint or hint, error.code
        result.append(kind(problem, expected=error.expected, where=where, hint=own, code=code))
    return result


def inside(check: Check, value: object, place: str, errors: Problems) -> Any:
    """Return the converted value at that place of a list or table."""
    try:
        return check.read(value)
    except AdapterkitError as error:
        for one in getattr(error, "errors", (error,)):
            if not one.where and not one.problem.startswith(" = "):
                one.problem = f": {one.problem}"
            if one.where[:1] in ("", ".", "["):  # else it already names its place
                one.where = place + one.where
            errors.append(one)
    except (ValueError, TypeError):
        errors.append(invalid_value(value, check.expected, check.hint, check.words))
        errors[-1].where = place
    return None


def invalid_value(
    value: object,
    expected: str,
    hint: str = "",
    words: Sequence[str] | Callable[[], Iterable[str]] = (),
) -> Refused:
    """Return the refusal of a value; its place is added later."""
    known = words() if callable(words) else words
    near = did_you_mean([value], known) if known and isinstance(value, str) else ""
    return Refused(f" = {shown(repr(value))}", expected=expected, hint=near or hint, code="AK101")


# -- checks ----------------------------------------------------------------------------------------


def test(expected: str, fits: Callable[[Any], object]) -> Check:
    """A check that passes a value unchanged if it fits."""

    def read(value: object) -> Any:
        if not fits(value):
            raise ValueError
        return value

    return Check(expected, read)


def of_type(expected: str, *types: type) -> Check:
    """A check that passes values of these types unchanged; true and false are not numbers."""
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
        raise Refused(str(error), expected="a regular expression", code="AK104") from error


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
COUNT = test("a count", lambda value: type(value) is int and 0 <= value < 1 << 63)
TABLE = of_type("a table", dict)
PATTERN = Check("a regular expression", _compiled)


def optional(check: Check) -> Check:
    """A check that also allows None."""
    return dataclasses.replace(
        check, read=lambda value: None if value is None else check.read(value)
    )


def one_of(*words: object) -> Check:
    """A check for one of these values; returns the text of an enum."""
    texts = tuple(word for word in words if isinstance(word, str))
    return Check(", ".join(map(str, words)), lambda value: words[words.index(value)], texts)


def list_of(check: Check, expected: str = "a list") -> Check:
    """A check for a list whose items pass `check`; returns a tuple, with the items of a set in
    order of their texts."""

    def read(value: object) -> tuple[Any, ...]:
        if isinstance(value, set | frozenset):
            value = sorted(value, key=str)
        if not isinstance(value, Sequence) or isinstance(value, str | bytes):
            raise ValueError
        errors = Problems()
        items = tuple(inside(check, one, f"[{i}]", errors) for i, one in enumerate(value))
        errors.raise_all()
        return items

    return Check(expected, read)


def one_or_several(check: Check) -> Check:
    """A check for a list that may also be given as a single item."""
    several = list_of(check)
    alone = lambda value: [value] if isinstance(value, str | int) else value
    return Check(f"{check.expected}, or a list", lambda value: several.read(alone(value)))


def table_of(key: Check, check: Check) -> Check:
    """A check for a table whose keys and values pass these checks."""

    def read(value: object) -> dict[Any, Any]:
        if not isinstance(value, Mapping):
            raise ValueError
        errors = Problems()
        table = {
            inside(key, name, f".{name}", errors): inside(check, one, f".{name}", errors)
            for name, one in value.items()
        }
        errors.raise_all()
        return table

    return Check("a table", read)


def entries(checks: Mapping[str, Check]) -> Check:
    """A check for a table with at least these entries; returns it unchanged."""

    def read(table: object) -> Any:
        if not isinstance(table, Mapping):
            raise ValueError
        errors = Problems(_missing(checks, checks.keys() - table.keys()))
        values({name: check for name, check in checks.items() if name in table}, table, errors)
        Problems(errors).raise_all()
        return table

    return Check("a table", read)


def misnamed(
    names: Iterable[str], checks: Mapping[str, Check], needed: Iterable[str]
) -> list[AdapterkitError]:
    """Return the errors of missing or unknown names in a table; to be `placed`."""
    errors = Problems(_missing(checks, set(needed) - set(names)), code="AK101")
    for name in sorted(map(str, set(names) - checks.keys())):
        hint, expected = did_you_mean([name], checks) or "remove it", ", ".join(checks) or "nothing"
        errors.add(" is unknown", expected, hint, where=f".{name}")
    return errors


def _missing(checks: Mapping[str, Check], names: Iterable[str]) -> list[AdapterkitError]:
    errors = Problems(hint="give it", code="AK101")
    for name in sorted(names):
        errors.add(" is missing", checks[name].expected, where=f".{name}")
    return errors


def also(check: Check, expected: str, fits: Callable[[Any], object]) -> Check:
    """A check whose converted value must also fit."""
    second = test(expected, fits)
    return Check(expected, lambda value: second.read(check.read(value)))


def _either(checks: Sequence[Check]) -> Check:
    """A check that applies the first of the checks that the value fits."""

    def read(value: object) -> Any:
        for check in checks:
            if check.fits(value):
                return check.read(value)
        raise ValueError

    return Check(" or ".join(check.expected for check in checks), read)


def _record_of(record: Any) -> Check:
    """A check for a table whose keys are fields of the record."""

    def read(table: Any) -> Any:
        if not isinstance(table, Mapping):
            raise ValueError
        checks = checks_of(record)
        errors = Problems(misnamed(table, checks, required(record)))
        given = {name: one for name, one in table.items() if name in checks}
        found = {name: inside(checks[name], one, f".{name}", errors) for name, one in given.items()}
        Problems(errors).raise_all()
        return record(**found)

    return Check("a table", read)


@cache
def checks_of(record: Any) -> dict[str, Check]:
    """Return the check of each field of a record; an option brings its own."""
    fields = dataclasses.fields(record)
    if options := [one for one in fields if "option" in one.metadata]:
        return {one.name: one.metadata["option"].check for one in options}
    hints = get_type_hints(record)
    return {one.name: one.metadata.get("check") or check_of(hints[one.name]) for one in fields}


def required(record: Any) -> set[str]:
    """Return the fields of a record that have no default."""
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
def check_of(kind: object) -> Check:
    """Return the check of an annotation."""
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

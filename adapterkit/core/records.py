"""One way from JSON, TOML or a caller to checked values.

A `Check` says what a value is to be, and makes it that. `check_of` gives the check of an
annotation: int, float, bool, str, Any, Literal, tuples and maps of these, `re.Pattern`, records,
`X | None`; a record is a frozen dataclass whose fields have the checks of their annotations, or
those of `checked_field`. `read` gives the record of a table. All that is wrong is refused
together, each with its place, what was found and what is expected.
"""

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
Settings = Mapping[str, Any]  # one that is read: of JSON, YAML or TOML
MOST = 2**31 - 1  # no whole number is larger, but a count of bytes


@dataclasses.dataclass(frozen=True)
class Check:
    """What a value is to be, as a text and as a function: from the value to what is used, or
    `ValueError`, or errors with reasons of their own.

    `words`: those that it may be, or a function of them where they are known on use alone; `hint`:
    the way out where none of them is near. Of options: `kind`, how a text is read on the command
    line, in plan files and pipelines (text, flag, integer, number, targets, settings; file; source,
    sources: what is an input), and `several`, a list."""

    expected: str
    read: Callable[[Any], Any]
    words: Sequence[str] | Callable[[], Iterable[str]] = ()
    hint: str = ""
    kind: str = "text"
    several: bool = False

    def fits(self, value: object) -> bool:
        """Whether a value is what is expected."""
        try:
            self.read(value)
        except (ValueError, TypeError, AdapterkitError):
            return False
        return True

    @property
    def is_source(self) -> bool:
        return self.kind in ("source", "sources")


def checked_field(default: T, check: Check) -> T:
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
    value = inside(check_of(record), table, "", errors)
    Problems(placed(errors, where, hint=hint, name=name, kind=kind)).raise_all()
    return value


def problems(
    check: Check, value: object, where: str, *, hint: str, kind: type[AdapterkitError] = Refused
) -> list[AdapterkitError]:
    """What is wrong with a value, whose place is `where`."""
    errors = Problems()
    inside(check, value, "", errors)
    return placed(errors, where, hint=hint, kind=kind)


def values(
    checks: Mapping[str, Check], table: Mapping[str, Any], errors: Problems
) -> dict[str, Any]:
    """What the checks make of the values of these names, None where there is none; what is wrong
    goes to `errors`, to be `placed`."""
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
    """Errors of values as the user sees them: the place in the table, then what is wrong."""
    result = []
    for error in errors:
        is_within = error.where[:1] in ("", ".", "[")
        place = re.sub(r"^\.(\w+)", lambda match: name(match[1]), error.where)
        problem = (place * is_within + error.problem).removeprefix(" = ")
        own, code = error.hint or hint, error.code
        result.append(kind(problem, expected=error.expected, where=where, hint=own, code=code))
    return result


def inside(check: Check, value: object, place: str, errors: Problems) -> Any:
    """What a check makes of a value at that place of a list or table."""
    try:
        return check.read(value)
    except AdapterkitError as error:
        for one in getattr(error, "errors", (error,)):
            if not one.where and not one.problem.startswith(" = "):
                one.problem = f": {one.problem}"
            if one.where[:1] in ("", ".", "["):  # else it says where in its own words
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
    """The refusal of a value, by a check or by what it is made of; its place is added later."""
    known = words() if callable(words) else words
    near = did_you_mean([value], known) if known and isinstance(value, str) else ""
    return Refused(f" = {shown(repr(value))}", expected=expected, hint=near or hint, code="AK101")


# -- checks ----------------------------------------------------------------------------------------


def test(expected: str, fits: Callable[[Any], object]) -> Check:
    """A value as it is, where it fits."""

    def read(value: object) -> Any:
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
    """A list, of which one item may stand alone."""
    several = list_of(check)
    alone = lambda value: [value] if isinstance(value, str | int) else value
    return Check(f"{check.expected}, or a list", lambda value: several.read(alone(value)))


def table_of(key: Check, check: Check) -> Check:
    """A table, its keys and its values as the checks make them."""

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
    """A table that has these words, whatever else it has, as it is."""

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
    """What is wrong with the words of a table: some are missing, or unknown; to be `placed`."""
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
    """What a check makes of a value, where it fits, too."""
    second = test(expected, fits)
    return Check(expected, lambda value: second.read(check.read(value)))


def _either(checks: Sequence[Check]) -> Check:
    """What the first of the checks that a value fits makes of it."""

    def read(value: object) -> Any:
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
        errors = Problems(misnamed(table, checks, required(record)))
        given = {name: one for name, one in table.items() if name in checks}
        found = {name: inside(checks[name], one, f".{name}", errors) for name, one in given.items()}
        Problems(errors).raise_all()
        return record(**found)

    return Check("a table", read)


@cache
def checks_of(record: Any) -> dict[str, Check]:
    """The check of each field of a record: of an option its own."""
    fields = dataclasses.fields(record)
    if options := [one for one in fields if "option" in one.metadata]:
        return {one.name: one.metadata["option"].check for one in options}
    hints = get_type_hints(record)
    return {one.name: one.metadata.get("check") or check_of(hints[one.name]) for one in fields}


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
def check_of(kind: object) -> Check:
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

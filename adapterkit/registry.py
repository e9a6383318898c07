"""Families of methods: every module of a package that holds a record with a `name` is a member. Adding a member adds one file."""

import dataclasses
import importlib
import pkgutil
from functools import cache

from adapterkit.errors import Refused


@cache
def members(package: str) -> dict[str, type]:
    """Name -> record of every method in `adapterkit.<package>`, in the order of their names."""
    home = importlib.import_module(f"adapterkit.{package}")
    found: dict[str, type] = {}
    for info in pkgutil.iter_modules(home.__path__):
        module = importlib.import_module(f"{home.__name__}.{info.name}")
        for value in vars(module).values():
            if (
                isinstance(value, type)
                and value.__module__ == module.__name__
                and isinstance(getattr(value, "name", None), str)
            ):
                found[value.name] = value
    return dict(sorted(found.items()))


def options(record: type) -> dict[str, dataclasses.Field]:
    """The options that a method takes: the fields of its record."""
    return {field.name: field for field in dataclasses.fields(record)}


def create(package: str, name: str, given: dict[str, object]) -> object:
    """The record of the method `name` with the options that were given (not None); `Refused` for an unknown name or option, or a
    missing one."""
    known = members(package)
    if name not in known:
        raise Refused(
            f"method {name!r}", expected=", ".join(known), where="--method", hint="use one of these"
        )
    fields, given = (
        options(known[name]),
        {key: value for key, value in given.items() if value is not None},
    )
    unknown = sorted(set(given) - set(fields))
    lacking = [k for k, f in fields.items() if k not in given and f.default is dataclasses.MISSING]
    if unknown or lacking:
        found = [f"--{key} given" for key in unknown] + [f"no --{key}" for key in lacking]
        raise Refused(
            f"method {name}: {', '.join(found)}",
            expected="the options "
            + (", ".join(f"--{key}" for key in fields) or "of the method (none)"),
            where="options",
            hint="leave out what the method does not take, and give what it needs",
        )
    numbers = [key for key in given if "float" in str(fields[key].type)]
    wrong = [
        key
        for key in numbers
        if not isinstance(given[key], float | int) or isinstance(given[key], bool)
    ]
    if wrong:
        found = ", ".join(f"--{key} {given[key]!r}" for key in wrong)
        raise Refused(
            f"method {name}: {found}", expected="numbers", where="options", hint="give numbers"
        )
    return known[name](**given)

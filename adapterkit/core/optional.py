"""Packages that only some jobs need."""

from importlib import import_module
from types import ModuleType

from adapterkit.core.errors import Refused, shown


def optional(module: str, *, install: str, expected: str, where: str = "") -> ModuleType:
    """A module of a package that need not be there; `Refused` without it, with what `pip install`
    takes."""
    package = module.partition(".")[0]
    try:
        return import_module(module)
    except ImportError as error:
        is_absent = (error.name or "").partition(".")[0] == package
        problem = "is not installed" if is_absent else f"cannot be imported: {shown(error)}"
        raise Refused(
            f"{package} {problem}",
            expected=expected,
            where=where,
            hint=f"pip install {install}",
            code="AK110",
        ) from error

"""Modules that are imported at the first use of one of their names, because a plan is made of
headers and records and computes nothing; and optional packages."""

import sys
from collections.abc import Callable
from functools import cached_property
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from adapterkit.core.errors import Refused, shown


class LazyModule:
    def __init__(self, name: str):
        self._name = name

    @cached_property
    def _module(self) -> ModuleType:
        return import_module(self._name)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def submodules(package: str) -> Callable[[str], LazyModule]:
    """Return the `__getattr__` of a package whose modules load lazily."""

    def find(name: str) -> LazyModule:
        if name.startswith("__"):
            raise AttributeError(name)
        return LazyModule(f"{package}.{name}")

    return find


def optional(module: str, *, install: str, expected: str, where: str = "") -> ModuleType:
    """Import a module of an optional package; `Refused` without it, with the name to install."""
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


if TYPE_CHECKING:
    import torch as torch
    from torch import Tensor as Tensor
else:
    torch = LazyModule("torch")

    class _TensorType(type):
        def __instancecheck__(cls, value: object) -> bool:
            return "torch" in sys.modules and isinstance(value, torch.Tensor)

    class Tensor(metaclass=_TensorType):
        """torch.Tensor in annotations and `isinstance`, neither of which loads torch."""

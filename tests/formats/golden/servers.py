"""A server's own loader in the wheel of its package, without the rest of it, and what it makes of
converted adapters: the frame of make_vllm.py and make_sglang.py."""

import importlib.abc
import importlib.machinery
import importlib.util
import shutil
import sys
import types
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

import adapterkit

# adapters whose conversions are no cases of other tests, in a folder `served`: of Gemma 4, of which
# some layers have no values or no keys (vllm#41754, sglang#28199)
SERVED = {"gemma4": "peft/gemma4"}


class Empty(types.ModuleType):
    """A module in which every name is an empty class; as a decorator it changes nothing."""

    def __init__(self, name: str):
        super().__init__(name)
        self.__path__ = []

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)

        def new(cls: type, *values: Any, **_: Any) -> Any:
            return values[0] if values and callable(values[0]) else object.__new__(cls)

        members = {"__new__": new, "__class_getitem__": classmethod(lambda cls, _: cls)}
        value = type(name, (), members)
        setattr(self, name, value)
        return value


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """A package's own modules where they are `real`, empty ones for all others."""

    def __init__(self, root: Path, package: str, real: set[str]):
        self.root, self.package, self.real = root, package, real

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname.split(".")[0] != self.package:
            return None
        if fullname in self.real:
            file = self.root / (fullname.replace(".", "/") + ".py")
            return importlib.util.spec_from_file_location(fullname, file)
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: Any) -> types.ModuleType:
        return Empty(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def unpack(wheel: Path, place: Path, real: set[str]) -> None:
    """Make a wheel's package importable from `place`: the modules in `real`, the rest empty."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(place, [n for n in archive.namelist() if n.endswith(".py")])
    (package,) = {name.split(".")[0] for name in real}
    sys.meta_path.insert(0, Finder(place, package, real))


def record(
    golden: Path,
    to: str,
    cases: Mapping[str, str],  # name -> the adapter in PEFT's layout that it is made of
    read: Callable[[Path, Path], Mapping[str, Tensor]],  # of an adapter's folder and its base's
) -> None:
    """Write the golden folders of a format, each with its base and what the loader has of it."""
    for case, source in cases.items():
        folder, base = golden / to / case, golden / source / "base"
        shutil.rmtree(folder, ignore_errors=True)
        adapterkit.convert(golden / source, to=to, out=folder, base=base)
        for name in ("README.md", "adapterkit.json"):
            (folder / name).unlink()
        shutil.copytree(base, folder / "base")
        tensors = {name: one.clone().contiguous() for name, one in read(folder, base).items()}
        save_file(tensors, folder / f"{to}.safetensors")

"""Families of methods: each module of a package that holds a record with a `name` is a member.

To add a member, add one file. `members` imports all records, `member` one of them; `declarations`
reads the same from their source, for code that must not import torch: the help and completion."""

import ast
import dataclasses
import importlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

from adapterkit import doors
from adapterkit.core import records
from adapterkit.core.errors import Refused, alternatives, did_you_mean
from adapterkit.core.records import Json

M = TypeVar("M")
Tier = Literal["core", "stable", "experimental"]
STABLE: Tier = "stable"  # the default tier
TIERS: dict[Tier, str] = {
    "core": "options, files and bytes follow semantic versioning",
    "stable": "options and files follow semantic versioning; bytes may change with any release",
    "experimental": "may change or go with any release",
}


def experimental(member: M) -> M:
    """Mark a function or class outside a family as experimental (decorator)."""
    setattr(member, "tier", "experimental")  # noqa: B010  M declares no tier
    return member


@cache
def members(family: str) -> dict[str, type]:
    """Return name -> record of every member of a family of `doors.py`, sorted by name."""
    return {name: member(family, name) for name in declarations(family)}


def member(family: str, name: str) -> type:
    """Return the record of one member without importing the others."""
    home, file = doors.FAMILIES[family], declarations(family)[name].module
    return _named(f"{home}.{file}", name)


def options(record: type) -> dict[str, dataclasses.Field]:
    """Return the options of a method: the fields of its record."""
    return {field.name: field for field in dataclasses.fields(record)}


@dataclasses.dataclass(frozen=True)
class Declaration:
    """A method as its record's source declares it."""

    module: str  # its file in the family's folder
    summary: str  # first paragraph of the module's docstring, without the method's name
    constants: Json  # class attributes with literal values
    options: tuple[str, ...]  # fields of the record

    @property
    def tier(self) -> str:
        return self.constants.get("tier", STABLE)


@cache
def declarations(family: str) -> dict[str, Declaration]:
    """Return name -> declaration of every member of a family, without importing them."""
    declared = {}
    folder = Path(doors.__file__).parent / doors.FAMILIES[family].replace(".", "/")
    for file in sorted(folder.glob("*.py")):
        module = ast.parse(file.read_text(encoding="utf-8"))
        summary = (ast.get_docstring(module) or "").partition("\n\n")[0].partition(": ")[2]
        summary = " ".join(summary.split())
        for record in (node for node in module.body if isinstance(node, ast.ClassDef)):
            constants = dict(_constants(record))
            fields = tuple(
                item.target.id
                for item in record.body
                if isinstance(item, ast.AnnAssign)
                and isinstance(item.target, ast.Name)
                and "ClassVar" not in ast.unparse(item.annotation)
            )
            if isinstance(constants.get("name"), str):
                declared[constants["name"]] = Declaration(file.stem, summary, constants, fields)
    return dict(sorted(declared.items()))


def verb_named(name: str) -> type:
    """Return the record of a verb."""
    return _named(doors.VERBS[name], name)


def _named(module: str, name: str) -> type:
    """Return the class with this name in a module of the package."""
    own = vars(importlib.import_module(f"adapterkit.{module}")).values()
    return next(one for one in own if isinstance(one, type) and vars(one).get("name") == name)


def written_formats(of: str = "targets") -> list[str]:
    """Return the quantized formats that can be written, by their names in `--to`; `of`: the
    attribute of a codec that lists them, `image_targets` for image models in one file."""
    codecs = declarations("codecs").values()
    return list(dict.fromkeys(n for one in codecs for n in one.constants.get(of, ())))


def _constants(record: ast.ClassDef) -> Iterator[tuple[str, Any]]:
    for item in record.body:
        if isinstance(item, ast.Assign) and isinstance(item.targets[0], ast.Name):
            try:
                yield item.targets[0].id, ast.literal_eval(item.value)
            except ValueError:  # computed
                continue


def create(family: str, name: str, settings: dict[str, object]) -> object:
    """Return the record of the method `name` with the settings that are not None; `Refused` lists
    every setting that is unknown, missing or of another type."""
    known = declarations(family)
    if name not in known:
        raise Refused(
            f"unknown method {name!r}",
            expected=alternatives(name, list(known)),
            where="--method",
            hint=did_you_mean([name], known) or "use one of these",
            code="AK101",
        )
    given = {key: value for key, value in settings.items() if value is not None}
    where, hint = f"--method {name}", "give another value"
    return records.read(member(family, name), given, where, hint=hint, name=as_flag)


LIFTED = ("density", "majority")  # options of methods that are options of `combine`


def as_flag(key: str) -> str:
    """Return a method's option as it is written on the command line, without a value."""
    return f"--{key}" if key in LIFTED else f"--set {key}"


def load(entry: str) -> Any:
    """Return the function of a `MODULE:NAME` of the package."""
    module, _, name = entry.partition(":")
    return getattr(importlib.import_module(f"adapterkit.{module}"), name)

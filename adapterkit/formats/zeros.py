"""Differences of zero, as distilled models' files have them for norms: nothing to keep."""

from dataclasses import replace

from adapterkit.errors import listed
from adapterkit.formats.capabilities import lacking
from adapterkit.formats.containers import PlanReader
from adapterkit.formats.record import Contents
from adapterkit.formats.schema import Format

DIFFERENCES = ("full", "modulation")


def without_zeros(contents: Contents, form: Format) -> Contents:
    """The contents without modules of zeros that the format has no keys for; read while planning,
    as what is written depends on them."""
    reader = PlanReader(contents.folders)
    homeless = [m for m in contents.modules if m.kind in DIFFERENCES and lacking(m, form, contents)]
    empty = {
        id(module)
        for module in homeless
        if not any(part.value(reader).any() for part in module.parts.values())
    }
    if not empty:
        return contents
    names = [module.path for module in homeless if id(module) in empty]
    note = f"{len(names)} differences of zero are left out: {listed(names)}"
    modules = tuple(module for module in contents.modules if id(module) not in empty)
    return replace(contents, modules=modules, notes=(*contents.notes, note))

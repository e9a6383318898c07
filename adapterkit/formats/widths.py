"""Adapters for a base with more inputs: control images beside the latents widen its first layer.

A client that widens the base's weight, with zeros, takes them; others refuse the shapes, or worse.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from adapterkit.errors import AdapterkitError, Refused, listed
from adapterkit.formats.library import architectures
from adapterkit.formats.record import FACTORS, Module
from adapterkit.formats.schema import Format
from adapterkit.formats.tensors import Numbers

SHAPE = "shape"  # the role of the widened weight's shape


def wider(modules: Iterable[Module], names: Sequence[str]) -> list[Module]:
    """The modules whose a has more columns than the base's weight in these architectures."""
    return [m for m in modules if m.kind == FACTORS and m.parts["a"].shape[1] > _inputs(m, names)]


def _inputs(module: Module, names: Sequence[str]) -> float:
    """Columns of the base's weight; infinite where none are known."""
    known = [
        words.inputs[module.name]
        for name in names
        if (words := architectures()[name].components.get(module.component)) is not None
        and module.name in words.inputs
    ]
    return max(known, default=float("inf"))


def too_wide(modules: Iterable[Module], form: Format, names: Sequence[str]) -> list[AdapterkitError]:
    """The refusal of a wider base by a format whose clients do not widen it."""
    paths = [module.path for module in wider(modules, names)] if not form.widens else []
    if not paths:
        return []
    return [
        Refused(
            f"more inputs than {' or '.join(names)} has, in {listed(paths)}",
            expected=f"the base's shapes: clients of {form.title} do not widen its weights",
            where="--to",
            hint="choose a format that does: diffusers, bfl, comfyui",
        )
    ]


def with_shapes(modules: Sequence[Module], form: Format, names: Sequence[str]) -> list[Module]:
    """The modules, the wide ones with their weight's shape where files in the format say it."""
    if SHAPE not in form.kinds.get(FACTORS, ()):
        return list(modules)
    wide = {id(module) for module in wider(modules, names)}
    return [_with_shape(module) if id(module) in wide else module for module in modules]


def _with_shape(module: Module) -> Module:
    shape = Numbers((module.parts["b"].shape[0], module.parts["a"].shape[1]))
    return replace(module, parts={**module.parts, SHAPE: shape})

"""Adapters for a base with more inputs: their first layer takes control images and latents.

Some clients widen the base's weight with zeros and accept them; others fail on the shapes.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from adapterkit.adapters.formats.library import architectures, formats
from adapterkit.adapters.formats.modules.kinds import FACTORS, SHAPE
from adapterkit.adapters.formats.modules.record import AdapterModule, Modules
from adapterkit.adapters.formats.modules.tensors import Expression, constant
from adapterkit.adapters.formats.schema import Format
from adapterkit.core.errors import Refused, listed, shown
from adapterkit.core.weights.reader import TensorReader


def base_inputs(names: Iterable[str]) -> dict[tuple[str, str], int]:
    """The inputs of layers that adapters may widen, by component and module: the most among these
    architectures."""
    inputs: dict[tuple[str, str], int] = {}
    for name in names:
        for component, words in architectures()[name].components.items():
            for module, count in words.inputs.items():
                inputs[component, module] = max(count, inputs.get((component, module), 0))
    return inputs


def with_widths(modules: Modules, format: Format, names: Sequence[str]) -> list[AdapterModule]:
    """The modules, with the shape of each widened weight if files in the format store it.

    `names`: the architectures that give the base's inputs. `Refused` if clients of the format do
    not widen the base.
    """
    inputs = base_inputs(names)
    wide = [
        m
        for m in modules
        if m.kind == FACTORS
        and (
            SHAPE in m.parts or m.parts["a"].shape[1] > inputs.get((m.component, m.name), math.inf)
        )
    ]
    if wide and not format.widens:
        others = [one.name for one in formats().values() if one.widens and one.writes]
        raise Refused(
            f"modules with more inputs than in the base: {listed([m.path for m in wide])}",
            expected=f"the base's shapes: clients of {format.title} do not widen its weights",
            where="--to",
            hint=f"choose one of {', '.join(others)}, whose clients do",
            code="AK503",
        )
    has_shape = SHAPE in format.kinds.get(FACTORS, ())
    shaped = {id(m): _with_shape(m) if has_shape else _without_shape(m) for m in wide}
    return [shaped.get(id(m), m) for m in modules]


def check_shape(parts: Mapping[str, Expression], reader: TensorReader, where: str) -> None:
    """`Refused` unless the weight has the shape of its factors' product."""
    if SHAPE not in parts:
        return
    shape = parts[SHAPE].value(reader).tolist()
    expected = [parts["b"].shape[0], *parts["a"].shape[1:]]
    if shape != expected:
        keys = ", ".join(shown(spec.key) for spec in parts[SHAPE].reads)
        raise Refused(
            f"{keys} is {shape}",
            expected=f"the shape of its factors' product, {expected}",
            where=where,
            hint="save the adapter again",
            code="AK503",
        )


def _with_shape(module: AdapterModule) -> AdapterModule:
    if SHAPE in module.parts:
        return module
    shape = constant((module.parts["b"].shape[0], module.parts["a"].shape[1]), "I64")
    return replace(module, parts={**module.parts, SHAPE: shape})


def _without_shape(module: AdapterModule) -> AdapterModule:
    return replace(module, parts={role: p for role, p in module.parts.items() if role != SHAPE})

"""A trained bias of a layer with factors: a role of theirs, or a difference of its own.

PEFT adds scale · bias beside b; other tools keep what is added to the layer's bias by itself.
"""

from dataclasses import replace

from adapterkit.formats.capabilities import roles_by_kind
from adapterkit.formats.modules.kinds import FACTORS
from adapterkit.formats.modules.record import AdapterModule, Modules
from adapterkit.formats.modules.tensors import scaled
from adapterkit.formats.schema import Format

BIAS, DIFFERENCE, FULL = "bias", "diff_b", "full"


def as_the_format_has_them(modules: Modules, form: Format) -> list[AdapterModule]:
    """The modules with their biases where the format's files have them."""
    kinds = roles_by_kind(form)
    has_role = BIAS in kinds.get(FACTORS, ())
    has_difference = DIFFERENCE in kinds.get(FULL, ())
    if has_difference and not has_role:
        return _apart(modules)
    if has_role and not has_difference:
        return _together(modules)
    return list(modules)


def _apart(modules: Modules) -> list[AdapterModule]:
    """diff_b = scale · bias as modules of their own, beside those of the factors."""
    differences = {(m.component, m.name): m for m in modules if m.kind == FULL}
    result: list[AdapterModule] = []
    for module in modules:
        bias = module.parts.get(BIAS) if module.kind == FACTORS else None
        if bias is None or (module.component, module.name) in differences:
            result.append(module)
            continue
        result.append(replace(module, parts={r: p for r, p in module.parts.items() if r != BIAS}))
        parts = {DIFFERENCE: scaled(bias, module.scale)}
        result.append(AdapterModule(module.component, module.name, FULL, parts, 1.0, 1))
    return result


def _together(modules: Modules) -> list[AdapterModule]:
    """bias = diff_b / scale among the factors, where a module has both."""
    factors = {
        (m.component, m.name): m
        for m in modules
        if m.kind == FACTORS and m.scale and BIAS not in m.parts
    }
    biases = {
        (m.component, m.name): m.parts[DIFFERENCE]
        for m in modules
        if m.kind == FULL and set(m.parts) == {DIFFERENCE} and (m.component, m.name) in factors
    }
    result: list[AdapterModule] = []
    for module in modules:
        key = (module.component, module.name)
        if key not in biases:
            result.append(module)
        elif module.kind == FACTORS:
            bias = scaled(biases[key], 1 / module.scale)
            result.append(replace(module, parts={**module.parts, BIAS: bias}))
    return result

"""The same delta in other parts: at another scale, or at a larger rank, for formats and servers
that have one for all modules; with its bias among the factors, or by itself.

PEFT adds scale · bias beside b; other tools keep what is added to the layer's bias by itself.
"""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from adapterkit.adapters.formats.capabilities import roles_by_kind
from adapterkit.adapters.formats.modules.kinds import FACTORS, KINDS, PLAIN
from adapterkit.adapters.formats.modules.parts import scaled_role
from adapterkit.adapters.formats.modules.record import AdapterModule, Modules
from adapterkit.adapters.formats.modules.tensors import Expression, padded, scaled
from adapterkit.adapters.formats.schema import Format

FLOAT32 = 2.0**-126, 2.0**128 - 2.0**104  # the smallest and the largest at full precision


def uniform(modules: Modules, rank: int | None = None) -> list[AdapterModule]:
    """The modules with one rank and one scale: zeros up to `rank` (default the largest), and the
    ratio of scales folded into b.

    The scale is the commonest one, so that most factors stay as they are; of equally many the
    largest. The delta scale · b @ a does not change. Modules without a rank stay.
    """
    ranked = [module for module in modules if module.kind in PLAIN]
    if not ranked:
        return list(modules)
    rank = max(rank or 0, *(module.rank for module in ranked))
    scale = common_scale(ranked)
    return [
        padded_to(with_scale(module, scale), rank) if module.kind in PLAIN else module
        for module in modules
    ]


def common_scale(modules: Iterable[AdapterModule]) -> float:
    """The scale that most modules have; 1 where none has one but 0."""
    counts = Counter(module.scale for module in modules if module.scale)
    return max(counts, key=lambda one: (counts[one], one)) if counts else 1.0


def shared_number(modules: Modules, means: str) -> tuple[float, list[AdapterModule]]:
    """The commonest alpha, or scale, of the modules that a float32 holds, and they with it: others
    have the ratio folded into b."""
    if means == "scale":
        number = common_scale(module for module in modules if is_float32(module.scale))
        return number, [with_scale(module, number) for module in modules]
    counts = Counter(module.alpha for module in modules if is_float32(module.alpha))
    number = max(counts, key=lambda one: (counts[one], one)) if counts else 1.0
    return number, [with_scale(module, number / module.rank) for module in modules]


def with_scale(module: AdapterModule, scale: float) -> AdapterModule:
    """The same delta at another scale: the ratio is folded into b and its bias, or the first of
    another kind's factors."""
    own = scaled_role(module)
    if not own:
        return module
    ratio = module.scale / scale
    if math.isclose(ratio, 1, rel_tol=1e-12):  # alpha / rank of different ranks
        return module
    parts = {
        role: scaled(part, ratio) if role in (own, "bias") else part
        for role, part in module.parts.items()
    }
    return replace(module, parts=parts, alpha=scale * module.rank, stored_alpha=None)


def padded_to(module: AdapterModule, rank: int) -> AdapterModule:
    """The same delta at a larger rank: zero rows of a and zero columns of b."""
    if module.rank == rank:
        return module
    parts: dict[str, Expression] = dict(module.parts)
    for role, axis in KINDS[module.kind].rank.items():
        parts[role] = padded(parts[role], rank, axis)
    return replace(module, parts=parts, rank=rank, alpha=module.scale * rank, stored_alpha=None)


def is_float32(number: float) -> bool:
    """Whether a float32 holds a number but 0 to its full precision."""
    smallest, largest = FLOAT32
    return smallest <= abs(number) <= largest


BIAS, DIFFERENCE, FULL = "bias", "diff_b", "full"


def as_the_format_has_them(modules: Modules, format: Format) -> list[AdapterModule]:
    """The modules with their biases where the format's files have them."""
    kinds = roles_by_kind(format)
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

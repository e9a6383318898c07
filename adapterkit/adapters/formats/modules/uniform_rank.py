"""Rewrite a delta with another scale or a larger rank, for formats and servers that have one for
all modules."""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from adapterkit.adapters.formats.modules.kinds import KINDS, PLAIN
from adapterkit.adapters.formats.modules.parts import scaled_role
from adapterkit.adapters.formats.modules.record import AdapterModule, Modules
from adapterkit.adapters.formats.modules.tensors import Expression, padded, scaled

FLOAT32 = 2.0**-126, 2.0**128 - 2.0**104  # the smallest and the largest at full precision


def uniform(modules: Modules, rank: int | None = None) -> list[AdapterModule]:
    """The modules with one rank and one scale: zeros up to `rank` (default the largest), and the
    ratio of scales folded into b.

    The scale is the commonest one, so that most factors stay as they are; the largest wins a tie.
    The delta scale · b @ a does not change. Modules without a rank stay.
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
    """The scale that most modules have; 1 if none has one except 0."""
    return _commonest(module.scale for module in modules if module.scale)


def _commonest(numbers: Iterable[float]) -> float:
    """The commonest number, the largest in a tie; 1 if there is none."""
    counts = Counter(numbers)
    return max(counts, key=lambda one: (counts[one], one)) if counts else 1.0


def shared_number(modules: Modules, means: str) -> tuple[float, list[AdapterModule]]:
    """The commonest alpha or scale that a float32 stores exactly, and the modules with it: others
    have the ratio folded into b."""
    if means == "scale":
        number = common_scale(module for module in modules if is_float32(module.scale))
        return number, [with_scale(module, number) for module in modules]
    number = _commonest(module.alpha for module in modules if is_float32(module.alpha))
    return number, [with_scale(module, number / module.rank) for module in modules]


def with_scale(module: AdapterModule, scale: float) -> AdapterModule:
    """The same delta at another scale: the ratio is folded into b and its bias, or into the first
    factor of another kind."""
    ratio = module.scale / scale
    if math.isclose(ratio, 1, rel_tol=1e-12):  # alpha / rank of different ranks
        return module
    own = scaled_role(module)
    if not own:
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
    """True if a float32 stores a nonzero number to its full precision."""
    smallest, largest = FLOAT32
    return smallest <= abs(number) <= largest

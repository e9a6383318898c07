"""Factors of a fused module with a separate a for each part, the layout of loralib's MergedLinear:
a (n·r, in), b (out, r). Part i uses rows i·r to i·r + r of a, and only trained parts have rows in
b."""

from collections.abc import Mapping
from dataclasses import replace

from adapterkit.adapters.formats.capabilities import EXTRACT
from adapterkit.adapters.formats.modules.fusing import Fusion
from adapterkit.adapters.formats.modules.row_permutations import shares_of
from adapterkit.adapters.formats.modules.tensors import Expression, block_diagonal, gathered
from adapterkit.core.errors import Refused, shown
from adapterkit.core.records import Settings

PARTS = 3  # of a layer that loralib's users train in parts: queries, keys, values
Parts = Mapping[str, Expression]


def groups_in(parts: Parts) -> int:
    """The number of groups of rows in the factors: 1 for standard ones."""
    a, b = parts["a"].shape, parts["b"].shape
    count, rest = divmod(a[0], b[1])
    return 1 if rest or count == 0 else count


def check_whole(groups: int, name: str, where: str) -> None:
    """`Refused` for some parts of a layer only: nothing in the file identifies them."""
    if groups not in (1, PARTS):
        raise Refused(
            f"{shown(name)} has factors of {groups} parts, which may be any of its layer's",
            expected=f"of the whole layer, or of {PARTS} parts (queries, keys and values)",
            where=where,
            hint=EXTRACT,
            code="AK503",
        )


def ungrouped(parts: Parts, shares: tuple[int, ...], where: str) -> Parts:
    """Standard LoRA factors of the same delta: b is block-diagonal, (out, n·r)."""
    b = parts["b"]
    rows = shares_of(b.shape[0], shares, where)
    blocks = [gathered(b, own) for own in rows]
    return {**parts, "b": block_diagonal(blocks, rows, b.shape[0])}


def trained(
    fusion: Fusion,
    names: list[str],
    settings: Settings,  # the config's values by word
    groups: int,
    where: str,
) -> tuple[Fusion, list[str]]:
    """The trained parts of a fused module, from its settings; all parts without settings if there
    are as many groups. `Refused` if the numbers differ."""
    rule = fusion.rule
    known = all(word in settings for word in rule.parts)
    is_there = [settings[word] if known else True for word in rule.parts]
    if sum(is_there) != groups:
        words = [word for word, there in zip(rule.parts, is_there, strict=True) if there]
        raise Refused(
            f"the file has factors of {groups} parts",
            expected=f"factors of {len(words)}: {', '.join(words)}",
            where=where,
            hint="keep the config in the folder of the file",
            code="AK503",
        )
    own = [i for i, there in enumerate(is_there) if there]
    pick = lambda values: tuple(values[i] for i in own) if values else ()
    rule = replace(rule, model=pick(rule.model), rows=pick(rule.rows), parts=pick(rule.parts))
    return replace(fusion, rule=rule), list(pick(names))

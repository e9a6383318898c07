"""Splitting one module of a file into modules of the model, and fusing them again.

Split: rows of b, a shared (the rank stays); a block-diagonal b gives each part its own columns and
rows of a. Fuse: equal a's stay one, others are stacked over a block-diagonal b.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from adapterkit.errors import Refused, shown
from adapterkit.formats.record import FACTORS, Module
from adapterkit.formats.rows import Heads, model_order, shares_of
from adapterkit.formats.schema import Rule
from adapterkit.formats.tensors import (
    BlockDiagonal,
    Constant,
    Expression,
    Rows,
    StoredReader,
    compact,
    gathered,
    joined,
    scaled,
)

# roles whose first axis is the module's output rows
BY_ROWS = ("b", "magnitude", "bias", "diff", "diff_b", "weight")


@dataclass(frozen=True)
class Fusion:
    """A rule in one naming: which rows of a file's module are which module's of the model."""

    rule: Rule
    naming: str
    heads: Heads | None = None

    @property
    def is_plain(self) -> bool:
        """Whether the module is the same on both sides."""
        return len(self.rule.model) == 1 and not self.rule.steps.get(self.naming)

    def rows(self, out: int, where: str) -> list[Rows]:
        """For each module of the model its rows in the file's."""
        order = model_order(self.rule.steps.get(self.naming, ()), out, self.heads, where)
        shares = self.rule.rows or (1,) * len(self.rule.model)
        return [compact([order[i] for i in part]) for part in shares_of(out, shares, where)]


def split(
    module: Module, names: Sequence[str], fusion: Fusion, reader: StoredReader
) -> list[Module]:
    """The modules of the model that a file's module holds.

    `Refused` for a kind whose rows cannot be told apart.
    """
    if fusion.is_plain:
        return [replace(module, name=names[0])]
    out = _rows_of(module)
    sets = fusion.rows(out, module.path)
    blocks = None
    if module.kind == FACTORS and len(sets) > 1:
        blocks = blocks_of(module.parts["b"].value(reader).flatten(1), sets)
    parts = []
    for index, (name, rows) in enumerate(zip(names, sets, strict=True)):
        own = {
            role: gathered(part, rows) if role in BY_ROWS else part
            for role, part in module.parts.items()
        }
        alpha, rank = module.alpha, module.rank
        if blocks is not None:
            columns = blocks[index]
            if not len(columns):
                continue  # a part of zeros
            own |= {"a": gathered(own["a"], columns), "b": gathered(own["b"], columns, 1)}
            alpha, rank = module.scale * len(columns), len(columns)
        stored = module.stored_alpha if rank == module.rank else None
        parts.append(
            replace(module, name=name, parts=own, alpha=alpha, rank=rank, stored_alpha=stored)
        )
    return parts


def fuse(modules: Mapping[int, Module], name: str, fusion: Fusion, reader: StoredReader) -> Module:
    """The file's module for modules of the model, by their places in the rule; `name` for messages.

    Modules that are missing get zero rows. `Refused` where they cannot be one.
    """
    first = next(iter(modules.values()))
    if fusion.is_plain:
        return first
    members = dict(sorted(modules.items()))
    out = _fused_rows(members, fusion.rule, first)
    sets = fusion.rows(out, first.path)
    kinds = {module.kind for module in members.values()}
    roles = {tuple(sorted(module.parts)) for module in members.values()}
    if len(kinds) > 1 or len(roles) > 1:
        raise Refused(
            f"{', '.join(shown(m.path) for m in members.values())} with "
            f"{' and '.join(sorted({role for some in roles for role in some}))}",
            expected=f"the same of all, for the one module {shown(name)} of the file",
            where=first.path,
            hint="give --rank and --lossy, or another format",
        )
    scale = first.scale
    parts: dict[str, Expression] = {}
    rank, alpha, stored = first.rank, first.alpha, first.stored_alpha
    if first.kind == FACTORS:
        bs = {i: scaled(m.parts["b"], m.scale / scale) for i, m in members.items()}
        if are_equal([m.parts["a"] for m in members.values()], reader):
            parts["a"] = first.parts["a"]
            parts["b"] = _placed(bs, sets, out)
        else:
            parts["a"] = joined([m.parts["a"] for m in members.values()])
            parts["b"] = BlockDiagonal(tuple(bs.values()), tuple(sets[i] for i in bs), out)
            rank = parts["a"].shape[0]
            alpha, stored = scale * rank, None
    for role in first.parts:
        if role in parts:
            continue
        values = {i: m.parts[role] for i, m in members.items()}
        if role in BY_ROWS and (len(values) == len(sets) or role not in ("magnitude", "weight")):
            if role == "bias":
                values = {i: scaled(v, members[i].scale / scale) for i, v in values.items()}
            parts[role] = _placed(values, sets, out)
        elif are_equal(list(values.values()), reader):
            parts[role] = first.parts[role]
        else:
            raise Refused(
                f"{role} of {len(values)} of {len(sets)} modules",
                expected=f"of all, for the one module {shown(name)} of the file",
                where=first.path,
                hint="give --rank and --lossy, or another format",
            )
    return replace(first, parts=parts, alpha=alpha, rank=rank, stored_alpha=stored)


def _rows_of(module: Module) -> int:
    sizes = {part.shape[0] for role, part in module.parts.items() if role in BY_ROWS}
    if len(sizes) != 1:
        raise Refused(
            f"a {module.kind} of a fused module",
            expected="low-rank factors, whose rows can be told apart",
            where=module.path,
            hint="give --rank N to make factors of it",
        )
    return sizes.pop()


def _fused_rows(members: Mapping[int, Module], rule: Rule, first: Module) -> int:
    """Rows of the whole from those of its parts; `Refused` where they contradict each other."""
    shares = rule.rows or (1,) * len(rule.model)
    totals = {_rows_of(m) * sum(shares) / shares[i] for i, m in members.items()}
    if len(totals) != 1 or not next(iter(totals)).is_integer():
        rows = ", ".join(f"{shown(m.path)} {_rows_of(m)}" for m in members.values())
        raise Refused(
            f"rows of the parts: {rows}",
            expected=f"rows in the proportion {':'.join(map(str, shares))}",
            where=first.path,
            hint="check the architecture (--architecture)",
        )
    return int(totals.pop())


def _placed(values: Mapping[int, Expression], sets: Sequence[Rows], out: int) -> Expression:
    """Rows of each part at their places among `out` rows, zeros where there is no part."""
    first = next(iter(values.values()))
    pieces, rows = [], []
    for index, places in enumerate(sets):
        zeros = Constant((len(places), *first.shape[1:]), 0.0, first.dtype)
        pieces.append(values.get(index, zeros))
        rows += places
    whole = joined(pieces)
    position = {row: at for at, row in enumerate(rows)}
    return gathered(whole, compact([position[row] for row in range(out)]))


def are_equal(parts: Sequence[Expression], reader: StoredReader) -> bool:
    """Whether tensors have the same values; read while planning, as the shape depends on it."""
    first = parts[0]
    if any(part.shape != first.shape or part.dtype != first.dtype for part in parts):
        return False
    others = [part for part in parts if part != first]
    if not others:
        return True
    value = first.value(reader)
    return all(torch.equal(value, part.value(reader)) for part in others)


def blocks_of(value: Tensor, sets: Sequence[Rows]) -> list[range] | None:
    """The columns of each part where b (out, r) is block-diagonal, else None."""
    is_used = torch.stack([(value[list(rows)] != 0).any(0) for rows in sets])
    if (is_used.sum(0) > 1).any() or is_used.any(1).sum() < 2:
        return None
    owners: list[int] = []
    for column in range(value.shape[1]):
        owner = is_used[:, column].nonzero()
        owners.append(int(owner) if len(owner) else (owners[-1] if owners else -1))
    first = next(owner for owner in owners if owner >= 0)
    owners = [first if owner < 0 else owner for owner in owners]
    if owners != sorted(owners):
        return None
    starts = [owners.index(i) if i in owners else 0 for i in range(len(sets))]
    return [range(start, start + owners.count(i)) for i, start in enumerate(starts)]

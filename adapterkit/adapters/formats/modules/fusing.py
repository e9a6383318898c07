"""Split one module of a file into modules of the model, and fuse them again.

Split: each part takes its rows of b and shares a, so the rank stays. If the parts use different
columns of b, as in a block-diagonal one, each gets its own columns and rows of a. Fuse: equal a's
stay one, others are stacked over a block-diagonal b. Fusing undoes a split.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeGuard

from adapterkit.adapters.formats.capabilities import (
    EXTRACT,
    FIT,
    FIT_ON_BASE,
    OTHER_FORMAT,
    can_be_plain,
    depends_on_base,
)
from adapterkit.adapters.formats.modules.kinds import CORES, FACTORS, KINDS, SIZED
from adapterkit.adapters.formats.modules.parts import matrix_shape, scaled_role
from adapterkit.adapters.formats.modules.record import AdapterModule, Modules
from adapterkit.adapters.formats.modules.row_permutations import (
    Heads,
    inverse,
    model_order,
    shares_of,
    unknown_heads,
)
from adapterkit.adapters.formats.modules.tensors import (
    Expression,
    Rows,
    StoredTensor,
    are_equal,
    block_diagonal,
    compact,
    gathered,
    index_of,
    joined,
    scaled,
    zeros,
)
from adapterkit.adapters.formats.modules.uniform_rank import common_scale
from adapterkit.adapters.formats.schema import HEADS, NamingRule
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.errors import AdapterkitError, Problems, Refused, listed, shown
from adapterkit.core.lazy import Tensor, torch
from adapterkit.core.weights.reader import TensorReader

# roles whose second axis is the module's inputs
MATRICES = ("a", "diff", "weight")
UNKNOWN = ("magnitude", "weight")  # roles that zeros cannot replace if a part is missing


@dataclass(frozen=True)
class Fusion:
    """A rule in one naming: the rows of a file's module that belong to each module of the model."""

    rule: NamingRule
    naming: str
    heads: Heads | None = None

    @property
    def is_plain(self) -> bool:
        """True if the module is the same on both sides."""
        orders = (self.rule.steps, self.rule.columns)
        return len(self.rule.model) == 1 and not any(own.get(self.naming) for own in orders)

    def columns(self, module: AdapterModule) -> Rows | None:
        """The column in the file's a for each input of the model; None if they are equal."""
        steps = self.rule.columns.get(self.naming, ())
        if not steps:
            return None
        if module.kind != FACTORS or "mid" in module.parts or "input_magnitude" in module.parts:
            raise Refused(
                f"{shown(module.path)}: {module.kind} with {', '.join(sorted(module.parts))}",
                expected="factors a and b, as the file has inputs in another order",
                where=module.path,
                hint=_fusing_hint([module]),
                code="AK503",
            )
        return model_order(steps, module.parts["a"].shape[1], self.heads, module.path)

    def rows(self, out: int, module: AdapterModule) -> list[Rows]:
        """The rows in the file's module (`out` in all) for each module of the model. `module`, for
        messages, is one of these or the file's."""
        steps = self.rule.steps.get(self.naming, ())
        inputs = inputs_of(module)
        if inputs is None and module.kind in SIZED:
            inputs = matrix_shape(module.kind, module.parts)[1]
        order = model_order(steps, out, self.heads, module.path, inputs)
        shares = self.shares(module.path)
        parts = shares_of(out, shares, module.path)
        return [compact(order[part.start : part.stop]) for part in parts]

    def shares(self, where: str) -> tuple[int, ...]:
        """The parts' shares of the file's rows; `Refused` if they need a config that is missing."""
        counts: dict[str, int] = {}
        if self.heads is not None:
            counts = dict(zip(HEADS, (self.heads.query, self.heads.key), strict=True))
        rows = [counts.get(one) if isinstance(one, str) else one for one in self.rule.rows]
        known = tuple(one for one in rows if one is not None)
        if len(known) < len(rows):
            raise unknown_heads("rows of fused modules", where)
        return known or (1,) * len(self.rule.model)


def split(
    module: AdapterModule, names: Sequence[str], fusion: Fusion, reader: TensorReader
) -> list[AdapterModule]:
    """The modules of the model that a file's module changes. `Refused` for a delta whose rows
    cannot be separated."""
    if fusion.is_plain:
        return [replace(module, name=names[0])]
    inputs = fusion.columns(module)
    if inputs is not None:
        own = {"a": gathered(module.parts["a"], inputs, 1)}
        module = replace(module, parts={**module.parts, **own})
    units = _units(module, EXTRACT)
    sets = fusion.rows(_out(module, units), module)
    columns = _columns(module, sets, reader)
    if "input_magnitude" in module.parts and len(names) > 1:
        module = replace(module, whole=tuple(names))
    parts = []
    for name, rows, own_columns in zip(names, sets, columns, strict=True):
        own = dict(module.parts)
        for role, unit in units.items():
            own[role] = gathered(own[role], _of_unit(rows, unit, module, EXTRACT))
        alpha, rank = module.alpha, module.rank
        if own_columns is not None:
            rank = len(own_columns)
            if not rank:
                continue
            for left, right in KINDS[module.kind].products:
                own[left] = gathered(own[left], own_columns, 1)
                own[right] = gathered(own[right], own_columns)
            alpha = alpha if rank == module.rank else module.scale * rank
        parts.append(replace(module, name=name, parts=own, alpha=alpha, rank=rank))
    return parts


def deciding_rows(module: AdapterModule, fusion: Fusion) -> list[TensorSpec]:
    """The rows that `split` reads first; empty if it refuses the module."""
    products = KINDS[module.kind].products
    if fusion.is_plain or not products:
        return []
    try:
        sets = fusion.rows(_out(module, _units(module, EXTRACT)), module)
    except AdapterkitError:
        return []
    factors = [module.parts[left] for left, _ in products]
    pairs = [(b, rows) for b in factors for rows in sets if len(sets) > 1]
    return [_stored_row(b.spec, rows[0]) for b, rows in pairs if _has_rows(b)]


def fuse(
    modules: Mapping[int, AdapterModule], name: str, fusion: Fusion, reader: TensorReader
) -> AdapterModule:
    """The file's module for modules of the model, by their positions in the rule.

    Missing modules get zero rows; if scales differ, b takes the ratio. `name` is for messages.
    `Refused` if they cannot become one.
    """
    members = [modules[place] for place in sorted(modules)]
    first = members[0]
    Problems(norm_problems(members)).raise_all()
    if fusion.is_plain:
        return first
    shares = fusion.shares(first.path)
    hint = _fusing_hint(members)
    sets = fusion.rows(_fused_rows(modules, shares, hint), first)
    places = [sets[place] for place in sorted(modules)]
    _check_alike(members, name, hint)
    scale = common_scale(members)
    usual = next((m for m in members if m.scale == scale), first)
    # the ratio for a part's factor; 1 if alpha / rank is equal despite different ranks
    is_common = lambda m: math.isclose(m.scale, scale, rel_tol=1e-12)
    ratios = [1.0 if is_common(member) else member.scale / scale for member in members]
    units = _units(first, hint)
    products = dict(KINDS[first.kind].products)
    groups = _groups(members, list(products.values()), reader)
    out = sum(map(len, sets))
    parts: dict[str, Expression] = {}
    for role in first.parts:
        values = [member.parts[role] for member in members]
        if role == scaled_role(first) or (role == "bias" and first.kind == FACTORS):
            values = [scaled(v, ratio) for v, ratio in zip(values, ratios, strict=True)]
        if role in products.values():
            parts[role] = joined([values[group[0]] for group in groups])
        elif role in units and len(members) < len(sets) and role in UNKNOWN:
            raise Refused(
                f"{role} only in {', '.join(shown(m.path) for m in members)}",
                expected=f"{role} in all modules that the file fuses into {shown(name)}",
                where=first.path,
                hint=hint,
                code="AK503",
            )
        elif role in products and len(groups) > 1:
            parts[role] = _diagonal(values, places, groups, out)
        elif role in units:
            own = [_of_unit(rows, units[role], first, hint) for rows in places]
            parts[role] = _placed(values, own, out // units[role])
        elif not are_equal(values, reader):
            raise Refused(
                f"{role} is not the same in {', '.join(shown(m.path) for m in members)}",
                expected=f"one for all, as {shown(name)} is one module of the file",
                where=first.path,
                hint=hint,
                code="AK503",
            )
        else:
            parts[role] = values[0]
    inputs = fusion.columns(first)
    if inputs is not None:
        columns = compact(inverse(torch.tensor([*inputs])).tolist())
        parts["a"] = gathered(parts["a"], columns, 1)
    rank = sum(members[group[0]].rank for group in groups)
    alpha = usual.alpha if (rank, scale) == (usual.rank, usual.scale) else scale * rank
    held = usual.stored_alpha
    if held is not None and math.isclose(alpha, held.number):  # this is its rounding
        alpha = held.number
    return replace(usual, parts=parts, alpha=alpha, rank=rank, whole=())


def norm_problems(members: Modules) -> list[AdapterkitError]:
    """Refuse norms of inputs that are taken over modules other than these, one of a file."""
    own = tuple(member.name for member in members)
    return [
        Refused(
            f"{shown(member.path)}: norms of inputs that are taken over "
            f"{listed(member.whole or [member.name])}",
            expected=f"over {listed(own)} alone, which are one module of the file",
            where=member.path,
            hint=FIT_ON_BASE,
            code="AK503",
        )
        for member in members
        if "input_magnitude" in member.parts and (member.whole or (member.name,)) != own
    ]


def inputs_of(module: AdapterModule) -> int | None:
    """Columns of the weight; None if no part determines them."""
    shapes = (module.parts[role].shape for role in MATRICES if role in module.parts)
    return next((shape[1] for shape in shapes if len(shape) > 1), None)


def _fusing_hint(members: Modules) -> str:
    """The hint for parts that cannot be fused. `--rank` helps if all can become standard LoRA."""
    others = [m for m in members if m.kind != FACTORS or set(m.parts) - {"a", "b"}]
    if not others or not all(map(can_be_plain, others)):
        return OTHER_FORMAT
    return FIT_ON_BASE if any(map(depends_on_base, others)) else FIT


def _units(module: AdapterModule, hint: str) -> dict[str, int]:
    """The roles by rows, each with the number of the delta's rows per row of the tensor.

    `Refused`, with the hint, for a delta whose rows are mixed.
    """
    roles = KINDS[module.kind].rows
    parts = module.parts
    units = {role: 1 for role in roles if role in parts}
    if module.kind == "lokr":  # rows of kron(w1, w2): w2's for each of w1's
        ones, twos = (next(r for r in (w, f"{w}_a") if r in parts) for w in ("w1", "w2"))
        of_one = parts[ones].shape[0] == 1
        units = {twos: 1} if of_one else {ones: parts[twos].shape[0]}
        units |= {"magnitude": 1} if "magnitude" in parts else {}
    if not units or any(core in parts for core in CORES):
        raise Refused(
            f"{shown(module.path)}: {module.kind} with {', '.join(sorted(parts))}",
            expected="low-rank factors, whose rows can be split: the model has other modules",
            where=module.path,
            hint=hint,
            code="AK503",
        )
    return units


def _out(module: AdapterModule, units: Mapping[str, int]) -> int:
    """Rows of the delta."""
    sizes = {module.parts[role].shape[0] * unit for role, unit in units.items()}
    if len(sizes) != 1:
        raise Refused(
            f"{shown(module.path)} has rows {' and '.join(map(str, sorted(sizes)))}",
            expected="as many of all its tensors",
            where=module.path,
            hint="save the adapter again",
            code="AK503",
        )
    return sizes.pop()


def _of_unit(rows: Rows, unit: int, module: AdapterModule, hint: str) -> Rows:
    """The rows of a factor, each of which stands for `unit` consecutive ones of the delta."""
    if unit == 1:
        return rows
    blocks = [rows[at : at + unit] for at in range(0, len(rows), unit)]
    starts = [block[0] for block in blocks]
    if any(
        start % unit or list(block) != list(range(start, start + unit))
        for start, block in zip(starts, blocks, strict=True)
    ):
        raise Refused(
            f"{shown(module.path)}: {module.kind} whose rows come {unit} at a time",
            expected=f"parts of the module in whole steps of {unit} rows",
            where=module.path,
            hint=hint,
            code="AK503",
        )
    return compact([start // unit for start in starts])


def _columns(
    module: AdapterModule, sets: Sequence[Rows], reader: TensorReader
) -> list[range | None]:
    """The columns of the rank that each part uses; None: all, shared. Read while planning, because
    the shapes depend on it."""
    shared: list[range | None] = [None] * len(sets)
    products = KINDS[module.kind].products
    if len(sets) < 2 or not products:
        return shared
    found: list[list[range] | None] = []
    for b in (module.parts[left] for left, _ in products):
        first = torch.stack([_row(b, rows[0], reader) for rows in sets]) != 0
        # the first rows may already show that they share the columns
        found.append(None if first.all() else blocks_of(b.value(reader).flatten(1), sets))
    if any(columns != found[0] for columns in found[1:]):
        return shared
    columns = found[0]
    if columns is None:
        return shared
    has_more = len(module.parts) > 2 * len(products)
    return [columns[0] if has_more and not len(own) else own for own in columns]


def blocks_of(
    value: Tensor,  # (out, r)
    sets: Sequence[Rows],
) -> list[range] | None:
    """Consecutive columns for each set of rows such that it uses no others, empty for rows of
    zeros; None if all sets share one set of columns."""
    is_used = torch.stack([(value[index_of(rows)] != 0).any(0) for rows in sets])
    if not is_used.any():
        return None
    equal = _equal_blocks(is_used)
    if equal is not None:
        return equal
    used = {i: own.nonzero().flatten().tolist() for i, own in enumerate(is_used) if own.any()}
    spans = {i: (columns[0], columns[-1] + 1) for i, columns in used.items()}
    groups: list[list[int]] = []  # parts with overlapping columns, in their order
    stop = 0
    for i in sorted(spans, key=lambda i: (spans[i][0], i)):
        if spans[i][0] < stop:
            groups[-1].append(i)
        else:
            groups.append([i])
        stop = max(stop, spans[i][1])
    leaders = [min(group) for group in groups]
    if leaders != sorted(leaders) or (len(groups) == 1 and len(spans) == len(sets)):
        return None
    starts = [0, *(spans[group[0]][0] for group in groups[1:]), value.shape[1]]
    blocks = [range(0)] * len(sets)
    for at, group in enumerate(groups):
        for i in group:
            blocks[i] = range(starts[at], starts[at + 1])
    return blocks


def _equal_blocks(is_used: Tensor) -> list[range] | None:
    """Equally many columns for each part, as in trainers of fused modules; else None."""
    parts, count = is_used.shape
    if count % parts:
        return None
    size = count // parts
    elsewhere = is_used.view(parts, parts, size).any(2) & ~torch.eye(parts, dtype=torch.bool)
    if elsewhere.any():
        return None
    return [range(i * size, (i + 1) * size) for i in range(parts)]


def _row(b: Expression, row: int, reader: TensorReader) -> Tensor:
    """One row, read alone if it is stored contiguously."""
    if not _has_rows(b):
        return b.value(reader)[row].flatten()
    return reader.tensor(_stored_row(b.spec, row)).flatten()


def _has_rows(b: Expression) -> TypeGuard[StoredTensor]:
    """True if each row is stored contiguously."""
    return isinstance(b, StoredTensor) and len(b.shape) == 2


def _stored_row(spec: TensorSpec, row: int) -> TensorSpec:
    return spec.narrowed(spec.shape, row, row + 1)


def _check_alike(members: Modules, name: str, hint: str) -> None:
    """`Refused` if parts differ in roles or inputs, because one module has the same for all."""
    errors = Problems(where=members[0].path, code="AK503")
    expected = f"the same in all, because the file has one module {shown(name)}"
    kinds = {m.path: f"{m.kind} {'/'.join(sorted(m.parts))}" for m in members}
    inputs = {m.path: m.parts["a"].shape[1:] for m in members if "a" in m.parts}
    if len(set(kinds.values())) > 1:
        listing = "; ".join(f"{shown(path)}: {kind}" for path, kind in kinds.items())
        errors.add(listing, expected, hint)
    elif len(set(inputs.values())) > 1:
        listing = ", ".join(f"{shown(path)} {shape}" for path, shape in inputs.items())
        errors.add(f"these modules have inputs of {listing}", expected, "save the adapter again")
    errors.raise_all()


def _fused_rows(members: Mapping[int, AdapterModule], shares: Sequence[int], hint: str) -> int:
    """Rows of the whole from those of its parts; `Refused` if they contradict each other."""
    rows = {place: _out(module, _units(module, hint)) for place, module in members.items()}
    totals = {rows[i] * sum(shares) / shares[i] for i in members}
    if len(totals) != 1 or not next(iter(totals)).is_integer():
        listing = ", ".join(f"{shown(m.path)} {rows[i]}" for i, m in members.items())
        raise Refused(
            f"the parts have these rows: {listing}",
            expected=f"rows in the proportion {':'.join(map(str, shares))}",
            where=next(iter(members.values())).path,
            hint="check the architecture (--architecture)",
            code="AK503",
        )
    return int(totals.pop())


def _groups(members: Modules, shared: Sequence[str], reader: TensorReader) -> list[list[int]]:
    """Groups of members with the same a, in the order of their first; one group if the kind has no
    a to stack."""
    if not shared:
        return [list(range(len(members)))]
    groups: list[list[int]] = []
    for i, member in enumerate(members):
        for group in groups:
            other = members[group[0]]
            if all(are_equal([other.parts[r], member.parts[r]], reader) for r in shared):
                group.append(i)
                break
        else:
            groups.append([i])
    return groups


def _diagonal(
    values: Sequence[Expression], places: Sequence[Rows], groups: Sequence[Sequence[int]], out: int
) -> Expression:
    """Each group's rows in columns of its own."""
    blocks = [joined([values[i] for i in group]) for group in groups]
    rows = [compact([row for i in group for row in places[i]]) for group in groups]
    return block_diagonal(blocks, rows, out)


def _placed(values: Sequence[Expression], places: Sequence[Rows], out: int) -> Expression:
    """Rows of each part at their positions among `out` rows, zeros elsewhere."""
    if all(isinstance(own, range) for own in places):
        return _in_order(values, [own for own in places if isinstance(own, range)], out)
    rows = [row for own in places for row in own]
    lacking = sorted(set(range(out)) - set(rows))
    pieces = list(values)
    if lacking:
        pieces.append(zeros((len(lacking), *values[0].shape[1:]), values[0].dtype))
    position = {row: at for at, row in enumerate([*rows, *lacking])}
    return gathered(joined(pieces), compact([position[row] for row in range(out)]))


def _in_order(values: Sequence[Expression], places: Sequence[range], out: int) -> Expression:
    """As `_placed`, for consecutive rows: parts one after the other, zeros in the gaps."""
    pieces: list[Expression] = []
    gap = lambda start, stop: [zeros((stop - start, *values[0].shape[1:]), values[0].dtype)]
    at = 0
    for value, own in sorted(zip(values, places, strict=True), key=lambda pair: pair[1].start):
        pieces += [*(gap(at, own.start) if at < own.start else []), value]
        at = own.stop
    return joined([*pieces, *(gap(at, out) if at < out else [])])

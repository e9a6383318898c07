"""Experts: one stack of matrices with its factors, or one module per expert.

Neutral (kind experts): a (E, r, in), b (E, out, r) of the stack that transformers loads, a
parameter such as `mlp.experts.gate_up_proj`; delta[e] = scale · b[e] @ a[e], whichever way round
the model keeps its matrices. The base's file maps an expert's module to rows of a stack: for
example `gate_proj`, or `w1` under another path, to the first half of `gate_up_proj`. A format may
also stack numbered modules along a first axis of one tensor.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from adapterkit.adapters.formats.modules.fusing import are_equal, blocks_of
from adapterkit.adapters.formats.modules.kinds import EXPERTS, FACTORS
from adapterkit.adapters.formats.modules.record import AdapterModule, Modules
from adapterkit.adapters.formats.modules.tensors import (
    Expression,
    gathered,
    joined,
    reshaped,
    transposed,
    zeros,
)
from adapterkit.adapters.formats.modules.uniform_rank import common_scale, padded_to, with_scale
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.commands import CHECK_BASE
from adapterkit.core.errors import Problems, Refused, listed, shown
from adapterkit.core.weights.names import Names
from adapterkit.core.weights.parameters import Parameter
from adapterkit.core.weights.reader import TensorReader

WEIGHT = ".weight"


# -- PEFT's two layouts of a stack -----------------------------------------------------------------


def neutral_factors(
    a: Expression, b: Expression, experts: int, *, transpose: bool, expert_first: bool = False
) -> dict[str, Expression]:
    """The factors of a stack as they are stored, a (E·r, x) and b (y, r·E).

    `transpose`: x is the matrices' `out`, y their `in`, as in PEFT up to 0.18 for matrices (out,
    in). `expert_first`: the columns of b count (E, r).
    """
    (rows, width), (height, columns) = a.shape, b.shape
    a = reshaped(a, (experts, rows // experts, width))
    if expert_first:
        b = transposed(reshaped(b, (height, experts, columns // experts)), (0, 1))
    else:
        b = reshaped(b, (height, columns // experts, experts))
        b = transposed(transposed(b, (0, 2)), (1, 2))
    if transpose:
        a, b = transposed(b, (1, 2)), transposed(a, (1, 2))
    return {"a": a, "b": b}


def stored_factors(parts: Mapping[str, Expression], *, transpose: bool) -> dict[str, Expression]:
    """a (E·r, x) and b (y, r·E), the expert fastest, of neutral factors: the inverse of
    `neutral_factors`."""
    a, b = parts["a"], parts["b"]
    if transpose:
        a, b = transposed(b, (1, 2)), transposed(a, (1, 2))
    experts, rank, width = a.shape
    height = b.shape[1]
    b = transposed(transposed(b, (1, 2)), (0, 2))
    return {"a": reshaped(a, (experts * rank, width)), "b": reshaped(b, (height, rank * experts))}


def is_transposed(
    shapes: Mapping[str, tuple[int, int, int]],  # by the stack's own name: E, x, y as stored
) -> bool | None:
    """True if the stored factors are those of the transposed matrices. The shapes of a gated pair
    show it, because gate_up has twice the rows that down has columns; None if they do not."""
    if not {"gate_up_proj", "down_proj"} <= shapes.keys():
        return None
    (_, x, y), (_, inner, outer) = shapes["gate_up_proj"], shapes["down_proj"]
    straight, turned = (x, y) == (outer, 2 * inner), (y, x) == (inner, 2 * outer)
    return None if straight == turned else turned


# -- stacks of a model, and the modules that its file has in their place ---------------------------


@dataclass(frozen=True)
class ExpertRows:
    """One expert's module in the base's file: these rows of its matrix in a stack."""

    expert: int
    module: str
    rows: range  # of the matrix as (out, in)


@dataclass(frozen=True)
class Stack:
    """A stack of matrices, one for each expert, as transformers loads it."""

    name: str
    shape: tuple[int, int, int]  # (experts, out, in)
    transposed: bool  # the model keeps the matrices (in, out)
    pieces: tuple[ExpertRows, ...] = ()  # empty if the file has the stack itself

    @property
    def home(self) -> str:
        """The module that owns the parameter."""
        return self.name.rpartition(".")[0]

    @property
    def modules(self) -> dict[str, int]:
        """The base's modules for this stack, with the rows of each; or the stack itself."""
        if not self.pieces:
            return {self.name: self.shape[1]}
        return {piece.module: len(piece.rows) for piece in self.pieces}

    @property
    def row_sets(self) -> list[range]:
        """The rows of an expert's modules, in order."""
        return sorted({piece.rows for piece in self.pieces}, key=lambda rows: rows.start)

    @classmethod
    def of(cls, parameter: Parameter, transposed: bool) -> "Stack":
        """The stack of a parameter with three axes."""
        experts, *matrix = parameter.shape
        out, width = reversed(matrix) if transposed else matrix
        pieces = _pieces(parameter, 2 if transposed else 1)
        return cls(parameter.name, (experts, out, width), transposed, tuple(pieces))


def stacks_of(names: Names) -> dict[str, Stack]:
    """All stacks of a base by their names in the model."""
    stacks = {}
    for name in names.all():
        parameter = names.parameter(name)
        if parameter is not None and len(parameter.shape) == 3:
            transposed = names.transposed_experts(name.rpartition(".")[0])
            stacks[name] = Stack.of(parameter, transposed)
    return stacks


def _pieces(parameter: Parameter, out: int) -> list[ExpertRows]:
    pieces = []
    for slot in parameter.slots:
        expert, rows = slot.axes[0], slot.axes[out]
        is_matrix = expert.axis is None and len(slot.shape) == 2 and slot.key.endswith(WEIGHT)
        if not is_matrix or rows.axis != 0 or rows.of != range(slot.shape[0]):
            return []
        module = slot.key.removesuffix(WEIGHT)
        pieces.append(ExpertRows(expert.at, module, range(rows.at, rows.stop)))
    return pieces


# -- from modules of single experts to stacks, and back --------------------------------------------


def stack_experts(
    modules: Modules, stacks: Iterable[Stack], reader: TensorReader
) -> list[AdapterModule]:
    """Join modules of single experts into factors of stacks, at the position of the first of each.
    Other modules stay. `Refused` if an expert's module has more than factors."""
    homes = {piece.module: stack for stack in stacks for piece in stack.pieces}
    groups: dict[str, dict[str, AdapterModule]] = {}
    errors = Problems(code="AK503")
    for module in modules:
        if module.name not in homes:
            continue
        more = sorted(set(module.parts) - {"a", "b"})
        if module.kind != FACTORS or more:
            errors.add(
                f"{shown(module.path)} has {listed(more) if more else module.kind}",
                "only a and b, because a stack of experts stores no others",
                "merge the adapter into its base",
            )
        groups.setdefault(homes[module.name].name, {})[module.name] = module
    errors.raise_all()
    stacked: dict[str, AdapterModule | None] = {
        name: _stack(homes[next(iter(members))], members, reader)
        for name, members in groups.items()
    }
    result = []
    for module in modules:
        if module.name not in homes:
            result.append(module)
        elif (own := stacked.pop(homes[module.name].name, None)) is not None:
            result.append(own)
    return result


def _stack(
    stack: Stack, members: Mapping[str, AdapterModule], reader: TensorReader
) -> AdapterModule:
    """The stack of its members. Gate and up with one a keep it, and their rows of b; otherwise the
    a's are stacked along the rank over a block-diagonal b. Missing experts and rows get zeros."""
    experts, _, width = stack.shape
    first = next(iter(members.values()))
    scale = common_scale(members.values())
    parts: dict[int, tuple[Expression, Expression]] = {}  # by the start of the rows
    for rows in stack.row_sets:
        own = {p.expert: members.get(p.module) for p in stack.pieces if p.rows == rows}
        known = [module for module in own.values() if module is not None]
        if not known:
            continue
        rank = max(module.rank for module in known)
        kind = first.parts["a"].dtype
        a: list[Expression] = []
        b: list[Expression] = []
        for expert in range(experts):
            module = own.get(expert)
            if module is None:
                a.append(zeros((1, rank, width), kind))
                b.append(zeros((1, len(rows), rank), kind))
                continue
            module = padded_to(with_scale(module, scale), rank)
            _check_shape(module, (len(rows), width))
            a.append(reshaped(module.parts["a"], (1, rank, width)))
            b.append(reshaped(module.parts["b"], (1, len(rows), rank)))
        parts[rows.start] = joined(a), joined(b)
    shared = are_equal([a for a, _ in parts.values()], reader)
    ranks = {start: a.shape[1] for start, (a, _) in parts.items()}
    rank = next(iter(ranks.values())) if shared else sum(ranks.values())
    bands = []
    for rows in stack.row_sets:
        own = parts.get(rows.start)
        dtype = next(iter(parts.values()))[1].dtype
        if own is None:
            bands.append(zeros((experts, len(rows), rank), dtype))
        elif shared:
            bands.append(own[1])
        else:
            blocks = [
                own[1] if start == rows.start else zeros((experts, len(rows), n), dtype)
                for start, n in ranks.items()
            ]
            bands.append(joined(blocks, 2))
    rows_of_a = [a for a, _ in parts.values()]
    factors = {"a": rows_of_a[0] if shared else joined(rows_of_a, 1), "b": joined(bands, 1)}
    return AdapterModule(first.component, stack.name, EXPERTS, factors, scale * rank, rank)


def split_experts(
    modules: Modules,
    stacks: Mapping[str, Stack],
    reader: TensorReader,
    *,
    all_of_them: bool = True,
    complete: bool = False,
) -> list[AdapterModule]:
    """Split factors of stacks into modules of single experts with the names in the base's file.
    Other modules stay.

    If b is block-diagonal, each module gets back its own columns and rows of a. `complete`: missing
    modules of an expert, or of a stack, get zeros. `all_of_them`: stacks that the file does not
    keep one by one are `Refused`; otherwise they stay.
    """
    errors = Problems(code="AK503")
    for module in modules:
        stack = stacks.get(module.name)
        if module.kind == EXPERTS and (stack is None or (all_of_them and not stack.pieces)):
            errors.add(
                f"{shown(module.path)} is one stack in the base's file too"
                if stack is not None
                else f"{shown(module.path)} is no stack of experts of the base",
                "a base whose file stores each expert separately",
                "convert to a format that stores stacks, or check --base",
            )
    errors.raise_all()
    result: list[AdapterModule] = []
    for module in modules:
        if module.kind == EXPERTS and stacks[module.name].pieces:
            result += _split(module, stacks[module.name], reader)
        else:
            result.append(module)
    return result + (_zeros(result, stacks.values()) if complete else [])


def _split(module: AdapterModule, stack: Stack, reader: TensorReader) -> list[AdapterModule]:
    a, b = module.parts["a"], module.parts["b"]
    _check_shape(module, stack.shape[1:])
    sets = stack.row_sets
    blocks = None
    if len(sets) > 1:
        blocks = blocks_of((b.value(reader) != 0).any(0), sets)
    result = []
    for piece in stack.pieces:
        own = gathered(gathered(b, range(piece.expert, piece.expert + 1)), piece.rows, 1)
        rows = gathered(a, range(piece.expert, piece.expert + 1))
        if blocks is not None:
            columns = blocks[sets.index(piece.rows)]
            if not len(columns):
                continue
            own, rows = gathered(own, columns, 2), gathered(rows, columns, 1)
        parts = {"a": reshaped(rows, rows.shape[1:]), "b": reshaped(own, own.shape[1:])}
        rank = parts["a"].shape[0]
        result.append(
            AdapterModule(module.component, piece.module, FACTORS, parts, module.scale * rank, rank)
        )
    return result


def _zeros(modules: Modules, stacks: Iterable[Stack]) -> list[AdapterModule]:
    """Zeros for missing modules of experts, and for missing stacks, next to those that exist."""
    known = {module.name: module for module in modules}
    homes: dict[str, list[Stack]] = {}
    for stack in stacks:
        homes.setdefault(stack.home, []).append(stack)
    added = []
    for own in homes.values():
        names = [name for stack in own for name in stack.modules if name in known]
        if not names:
            continue
        like = known[names[0]]
        dtype, rank = like.parts["a"].dtype, like.rank
        for stack in own:
            for name, rows in stack.modules.items():
                if name in known:
                    continue
                lead = () if stack.pieces else stack.shape[:1]
                parts: dict[str, Expression] = {
                    "a": zeros((*lead, rank, stack.shape[2]), dtype),
                    "b": zeros((*lead, rows, rank), dtype),
                }
                kind = FACTORS if stack.pieces else EXPERTS
                added.append(AdapterModule(like.component, name, kind, parts, like.alpha, rank))
    return added


def _check_shape(module: AdapterModule, expected: tuple[int, ...]) -> None:
    a, b = module.parts["a"], module.parts["b"]
    shape = (b.shape[-2], a.shape[-1])
    if shape != tuple(expected):
        raise Refused(
            f"{shown(module.path)} has factors of {shape}",
            expected=f"ones that fit the base's {tuple(expected)}",
            hint=CHECK_BASE,
            code="AK503",
        )


def slices(spec: TensorSpec) -> list[TensorSpec]:
    """The entries of a stored tensor along its first axis, each as a tensor of its own."""
    rows = (spec.narrowed(spec.shape, at, at + 1) for at in range(spec.shape[0]))
    return [replace(row, shape=row.shape[1:]) for row in rows]


def unstacked(roles: Mapping[str, TensorSpec]) -> list[dict[str, TensorSpec]] | None:
    """The tensors of each module of a stack; all may share one. None unless the stacks have one
    height."""
    heights = {spec.shape[0] for spec in roles.values()}
    height = max(heights)
    if heights - {1, height} or any(len(spec.shape) < 3 for spec in roles.values()):
        return None
    parts = {role: slices(spec) for role, spec in roles.items()}
    return [{role: own[i % len(own)] for role, own in parts.items()} for i in range(height)]


def stack(
    modules: Mapping[int, AdapterModule],  # by their places
    height: int,
    name: str,  # of the stack, for messages
) -> AdapterModule:
    """One module of kind experts: the largest rank, the commonest scale, zeros for missing modules.
    `Refused` unless all have standard LoRA factors of one size."""
    members = dict(sorted(modules.items()))
    last = next(reversed(members.values()))
    is_plain = all(m.kind == FACTORS and set(m.parts) == {"a", "b"} for m in members.values())
    sizes = {(m.parts["b"].shape[0], *m.parts["a"].shape[1:]) for m in members.values() if is_plain}
    if len(sizes) != 1 or max(members) >= height:
        raise Refused(
            f"{len(members)} modules, the last of them {shown(last.path)}",
            expected=f"plain factors of one size, of {height} modules at most, for {shown(name)}",
            where=last.path,
            hint="give the base that the adapter was trained on",
            code="AK503",
        )
    rank, scale = max(m.rank for m in members.values()), common_scale(members.values())
    own = {i: padded_to(with_scale(m, scale), rank) for i, m in members.items()}
    parts: dict[str, Expression] = {}
    for role in ("a", "b"):
        part = next(iter(own.values())).parts[role]
        none = zeros((1, *part.shape), part.dtype)
        places = [
            reshaped(own[i].parts[role], (1, *part.shape)) if i in own else none
            for i in range(height)
        ]
        parts[role] = joined(places)
    return AdapterModule(last.component, last.name, EXPERTS, parts, scale * rank, rank)

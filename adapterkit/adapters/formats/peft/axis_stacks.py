"""Stacks of experts whose first axis is the experts: a (E, r, in) and b (E, out, r) under the
parameter's own name; a factor that all experts share is (1, ...).

Sources: https://github.com/NVIDIA-NeMo/Megatron-Bridge (`peft_bridge.py`, which writes them) and
https://github.com/sgl-project/sglang/pull/21466 (which reads them).
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from adapterkit.adapters.formats.modules.experts import slices
from adapterkit.adapters.formats.modules.kinds import EXPERTS, FACTORS
from adapterkit.adapters.formats.modules.parts import misfits
from adapterkit.adapters.formats.modules.record import LANGUAGE, AdapterModule, Modules
from adapterkit.adapters.formats.modules.tensors import (
    Expression,
    from_spec,
    gathered,
    joined,
    shared,
)
from adapterkit.adapters.formats.peft.eight_bits import decoded
from adapterkit.core.adapter.record import Adapter, Lora, rank_mismatch
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.commands import command
from adapterkit.core.errors import Problems, Refused, shown
from adapterkit.core.weights.reader import TensorReader

OF_EXPERTS = re.compile(r"\.experts\.")
NUMBER = re.compile(r"(?<=\.experts)\.\d+(?=\.)")
KEY = re.compile(r"(.*\.experts)\.(?:(\d+)\.)?(?!base_layer\.)([^\W\d]\w*)(\.lora_[AB]\..*)")
# projections of one expert, which transformers joins in the parameters of a stack
SINGLE = {"gate_proj", "up_proj", "w1", "w2", "w3"}
# the parameters of a stack in the order of the models' code, and the factor that SGLang may share
SHARED = {"gate_up_proj": "a", "down_proj": "b"}


def with_each_expert(
    tensors: Mapping[str, TensorSpec],
    count: int | None,  # of a model's experts
) -> dict[str, TensorSpec]:
    """The tensors of a file, with those of each expert under keys of its own: stacks of projections
    that transformers joins with others, and factors shared by experts that have numbers."""
    numbers: dict[tuple[str, str], set[int]] = defaultdict(set)  # by home and projection
    leaves: dict[str, set[str]] = defaultdict(set)  # of the stacks of a home
    found = {key: match for key in tensors if (match := KEY.fullmatch(key))}
    for key, match in found.items():
        home, number, leaf, _ = match.groups()
        if number is not None:
            numbers[home, leaf].add(int(number))
        elif len(tensors[key].shape) == 3:
            leaves[home].add(leaf)
            if tensors[key].shape[0] > 1:
                numbers[home, f"{leaf} as a stack"] |= {*range(tensors[key].shape[0])}
    result: dict[str, TensorSpec] = {}
    for key, spec in tensors.items():
        match = found.get(key)
        if match is None or match[2] is not None or len(spec.shape) != 3:
            result[key] = spec
            continue
        home, _, leaf, end = match.groups()
        own = numbers[home, leaf]
        if not own and leaves[home] & SINGLE:
            own = numbers[home, f"{leaf} as a stack"] or {*range(count or 0)}
        if not own or spec.shape[0] not in (1, len(own)):
            result[key] = spec
            continue
        each = slices(spec)
        result |= {f"{home}.{n}.{leaf}{end}": each[at % len(each)] for at, n in enumerate(own)}
    return result


@dataclass(frozen=True)
class AxisStacks:
    """Reads such a file, for a model of `count` experts if it is known."""

    count: int | None

    def stored(self, tensors: dict[str, TensorSpec]) -> dict[str, TensorSpec]:
        """The tensors of a file, those in eight bits decoded, and those of single experts apart."""
        return with_each_expert(decoded(tensors), self.count)

    def has(self, lora: Lora) -> bool:
        """True for factors of a stack, or of one expert."""
        return OF_EXPERTS.search(lora.module) is not None

    def module(self, adapter: Adapter, lora: Lora) -> AdapterModule:
        """The factors of a stack, or of one expert. `Refused` for another rank than the config's,
        factors of different heights, and shared ones if the number of experts is unknown."""
        return _module(adapter, lora, self.count)

    def ordered(self, modules: Iterable[AdapterModule], where: str) -> list[AdapterModule]:
        """The modules, with the stacks of each home in the order of the models' code, in which PEFT
        nests them. `Refused` for parameters whose order is unknown without the model."""
        rows, homes = list(modules), defaultdict[str, list[str]](list)
        for module in rows:
            home, _, leaf = module.name.rpartition(".")
            if module.kind == EXPERTS:
                homes[home].append(leaf)
        errors = Problems(where=where, hint="give --base", code="AK402")
        for home, own in homes.items():
            if self.count is None and len(own) > 1 and {*own} - {*SHARED}:
                problem = f"{shown(home)} has the parameters {', '.join(map(shown, sorted(own)))}"
                errors.add(problem, "the model, which determines their order")
        errors.raise_all()
        return sorted(rows, key=_place)


def _place(module: AdapterModule) -> tuple[str, int]:
    home, _, leaf = module.name.rpartition(".")
    order = list(SHARED)
    if module.kind != EXPERTS:
        return module.name, 0
    return home, order.index(leaf) if leaf in order else 0


def _module(adapter: Adapter, lora: Lora, count: int | None) -> AdapterModule:
    """`AxisStacks.module`"""
    errors = Problems(where=adapter.label, code="AK302")
    is_stack = len(lora.a.shape) == len(lora.b.shape) == 3
    rank = lora.a.shape[1 if is_stack else 0]
    config, whole = adapter.config, NUMBER.sub("", lora.module)  # patterns name the stack
    known = [
        adapter.rank_and_alpha(name, config["r"], config["lora_alpha"])
        for name in (lora.module, whole)
    ]
    alpha = next((alpha for own, alpha in known if own == rank), None)
    if alpha is None:
        raise rank_mismatch(adapter, lora, rank, known[0][0])
    if config.get("use_rslora"):
        alpha = adapter.scale(rank, alpha) * rank
    if lora.magnitude is not None or lora.bias is not None:
        problem = f"{shown(lora.module)} has more than a and b"
        errors.add(problem, "a and b alone, of experts", "merge the adapter with its own program")
    parts = {"a": from_spec(lora.a), "b": from_spec(lora.b)}
    if is_stack:
        height = max(parts["a"].shape[0], parts["b"].shape[0])
        parts = {role: _repeated(part, _height(adapter, lora, height, count)) for role, part in
                 parts.items()}  # fmt: skip
    kind = EXPERTS if is_stack else FACTORS
    errors += misfits(shown(lora.module), kind, parts, adapter.label)
    errors.raise_all()
    return AdapterModule(LANGUAGE, lora.module, kind, parts, float(alpha), rank)


def _height(adapter: Adapter, lora: Lora, height: int, count: int | None) -> int:
    """The number of experts of a stack."""
    if height > 1 or count is not None:
        return count or height if height == 1 else height
    raise Refused(
        f"{shown(lora.module)}: all experts share both factors, so their number is unknown",
        expected="the model, which has it",
        where=adapter.label,
        hint="give the model to a conversion\n"
        + command("adapterkit convert", adapter.label, to="peft", base="BASE", out="for-peft"),
        code="AK402",
    )


def _repeated(part: Expression, height: int) -> Expression:
    return joined([part] * height) if part.shape[0] == 1 < height else part


def with_shared(
    modules: Modules, reader: TensorReader
) -> tuple[list[AdapterModule], Sequence[str]]:
    """The modules with one a of gate_up_proj and one b of down_proj for all experts if these are
    equal in every stack, and a note. SGLang shares either both or none."""
    stacks = [module for module in modules if module.kind == EXPERTS]
    leaves = [module.name.rpartition(".")[2] for module in stacks]
    if not stacks or {*leaves} - {*SHARED} or "gate_up_proj" not in leaves:
        return list(modules), ()
    ones = {}
    for module, leaf in zip(stacks, leaves, strict=True):
        role = SHARED[leaf]
        one = _one_for_all(module.parts[role], reader)
        if one is None:
            return list(modules), ()
        ones[module.path] = replace(module, parts={**module.parts, role: one})
    note = (
        "all experts share a of gate_up_proj and b of down_proj, stored once: give SGLang adapters "
        "of this form only"
    )
    return [ones.get(module.path, module) for module in modules], (note,)


def _one_for_all(part: Expression, reader: TensorReader) -> Expression | None:
    """The first matrix of a stack if the others equal it, or None. The values are read while
    planning, the first two before the rest."""
    one = shared(part)
    if one.shape[0] == 1 < part.shape[0]:
        return one
    if part.shape[0] == 1 or not part.known_early:
        return None
    first = gathered(part, range(1))
    value = first.value(reader)
    if not bool((gathered(part, range(1, 2)).value(reader) == value).all()):
        return None
    return first if bool((part.value(reader) == value).all()) else None

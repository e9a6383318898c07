"""Stacks of experts whose first axis is the experts: a (E, r, in) and b (E, out, r) under the
parameter's own name; a factor that all experts share is (1, ...).

Sources: https://github.com/NVIDIA-NeMo/Megatron-Bridge/pull/6076 (written) and
https://github.com/sgl-project/sglang/pull/21466 (read).
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from adapterkit.adapters.formats.modules.experts import slices
from adapterkit.adapters.formats.modules.kinds import EXPERTS, FACTORS
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
from adapterkit.core.errors import Refused, listed, shown
from adapterkit.core.weights.reader import TensorReader

NUMBER = re.compile(r"(?<=\.experts)\.\d+(?=\.)")
# after the experts in a key: perhaps the number of one, a projection, and the factor
REST = re.compile(r"(?:(\d+)\.)?(?!base_layer\.)([^\W\d]\w*)(\.lora_[AB]\..*)")
# projections of one expert, which transformers joins in the parameters of a stack
SINGLE = {"gate_proj", "up_proj", "w1", "w2", "w3"}
# the parameters of a stack in the order of the models' code, and the factor that SGLang may share
SHARED = {"gate_up_proj": "a", "down_proj": "b"}


@dataclass(frozen=True)
class AxisStacks:
    """Reads such a file, for a model of `count` experts if it is known."""

    count: int | None

    def stored(self, tensors: dict[str, TensorSpec]) -> dict[str, TensorSpec]:
        """The tensors of a file, with those of each expert under keys of its own: stacks of
        projections that transformers joins, and factors shared by experts that have numbers."""
        tensors = decoded(tensors)
        keys = {key: own for key in tensors if (own := _words(key)) is not None}
        homes = {home for home, _, leaf, _ in keys.values() if leaf in SINGLE}
        numbers: dict[tuple[str, str], set[int]] = defaultdict(set)
        for key, (home, number, leaf, _) in keys.items():
            height = tensors[key].shape[0]
            if number is not None:
                numbers[home, leaf].add(int(number))
            elif home in homes:
                numbers[home, leaf] |= {*range(height if height > 1 else self.count or 0)}
        result: dict[str, TensorSpec] = {}
        for key, spec in tensors.items():
            home, number, leaf, end = keys.get(key, ("", "", "", ""))
            own = sorted(numbers[home, leaf]) if number is None else []
            if len(spec.shape) != 3 or not own or spec.shape[0] not in (1, len(own)):
                result[key] = spec
                continue
            each = slices(spec)
            result |= {f"{home}.{n}.{leaf}{end}": each[at % len(each)] for at, n in enumerate(own)}
        return result

    def module(self, adapter: Adapter, lora: Lora) -> AdapterModule | None:
        """The factors of a stack, or of one expert; None for others. `Refused` for another rank
        than the config's, and shared factors if the number of experts is unknown."""
        if ".experts." not in lora.module:
            return None
        is_stack = len(lora.a.shape) == len(lora.b.shape) == 3
        rank, config = lora.a.shape[1 if is_stack else 0], adapter.config
        known = [  # patterns may name the stack
            adapter.rank_and_alpha(name, config["r"], config["lora_alpha"])
            for name in (lora.module, NUMBER.sub("", lora.module))
        ]
        alpha = next((alpha for own, alpha in known if own == rank), None)
        if alpha is None:
            raise rank_mismatch(adapter, lora, rank, known[0][0])
        if config.get("use_rslora"):
            alpha = adapter.scale(rank, alpha) * rank
        parts = {"a": from_spec(lora.a), "b": from_spec(lora.b)}
        height = max(part.shape[0] for part in parts.values())
        height = self.count or 1 if height == 1 else height
        problem, hint = (
            "",
            "give the model to a conversion\n"
            + command("adapterkit convert", adapter.label, to="peft", base="BASE", out="for-peft"),
        )
        if lora.magnitude is not None or lora.bias is not None:
            problem, hint = "more than a and b", "merge it with its own program"
        elif is_stack and height == 1 and self.count is None:
            problem = "one a and one b for all experts, whose number is unknown"
        if problem:
            what, expected = f"{shown(lora.module)} has {problem}", "a and b of a known number"
            raise Refused(what, expected=expected, where=adapter.label, hint=hint, code="AK402")
        if is_stack:
            parts = {n: joined([x] * height) if x.shape[0] == 1 else x for n, x in parts.items()}
        kind = EXPERTS if is_stack else FACTORS
        return AdapterModule(LANGUAGE, lora.module, kind, parts, float(alpha), rank)

    def ordered(self, modules: Iterable[AdapterModule], where: str) -> list[AdapterModule]:
        """The modules, with the stacks of each home in the order of the models' code, in which PEFT
        nests them. `Refused` for parameters whose order is unknown without the model."""
        rows, order = list(modules), [*SHARED]
        stacks = [module.name for module in rows if module.kind == EXPERTS]
        unknown = [name for name in stacks if name.rpartition(".")[2] not in SHARED]
        if self.count is None and unknown:
            raise Refused(
                f"parameters of experts: {listed(unknown)}",
                expected="the model, which determines their order",
                where=where,
                hint="give --base",
                code="AK402",
            )

        def place(module: AdapterModule) -> tuple[str, int]:
            home, _, leaf = module.name.rpartition(".")
            return (home, order.index(leaf)) if leaf in order else (module.name, 0)

        return sorted(rows, key=place)


def _words(key: str) -> tuple[str, str | None, str, str] | None:
    """The home of experts, the number of one, its projection and the rest of a key."""
    home, is_there, rest = key.rpartition(".experts.")
    match = REST.fullmatch(rest) if is_there else None
    return None if match is None else (f"{home}.experts", match[1], match[2], match[3])


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

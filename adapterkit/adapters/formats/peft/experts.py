"""Stacks of experts in files of PEFT's layout: keys give the nesting of the parameters in
`target_parameters`, but not their names."""

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from adapterkit.adapters.formats.base_model import NamedBase
from adapterkit.adapters.formats.modules.experts import (
    Stack,
    is_transposed,
    neutral_factors,
    stored_factors,
)
from adapterkit.adapters.formats.modules.kinds import EXPERTS
from adapterkit.adapters.formats.modules.record import LANGUAGE, AdapterModule
from adapterkit.adapters.formats.modules.tensors import Expression, from_spec
from adapterkit.adapters.formats.peft.expert_order import order_of
from adapterkit.adapters.formats.schema import AdapterSchema
from adapterkit.core.adapter.config import SLOWEST
from adapterkit.core.adapter.factors import Factors, factors_of
from adapterkit.core.adapter.keys import part_keys
from adapterkit.core.adapter.record import Adapter, Lora
from adapterkit.core.commands import command
from adapterkit.core.errors import AdapterkitError, Refused, shown

MOST = 4  # the most parameters of one module whose orders are tried


def factors_by_module(adapter: Adapter) -> dict[str, list[Lora]]:
    """The factors of parameters by their module: those that target_parameters names."""
    loras: dict[str, list[Lora]] = defaultdict(list)
    for lora in adapter.loras:
        loras[lora.module].append(lora)
    return {
        module: own
        for module, own in loras.items()
        if any(lora.depth for lora in own) or (own[0].kind == "module" and adapter.leaves(module))
    }


def read_stacks(
    adapter: Adapter,
    module: str,
    loras: Sequence[Lora],
    words: AdapterSchema,
    model: NamedBase | None,
) -> list[AdapterModule] | None:
    """The stacks of one module, the innermost first; None if the file leaves open which factors
    belong to which, or their orientation."""
    own = model.names.children(module) if model is not None else None
    stacks = model.stacks if model is not None else {}
    slowest = lambda leaf: words.slowest == "expert" or order_of(adapter.config, leaf) == SLOWEST
    for order in _orders(adapter, module, loras, own):
        try:
            factors = _factors(adapter, loras, order)
        except AdapterkitError:
            continue  # not their order: ranks contradict it
        turns = _turns(
            adapter, module, factors, words, stacks, certain=len(order) == 1 or bool(own)
        )
        if turns is not None:
            break
    else:
        if any(map(adapter.is_stack, loras)) and slowest(None):
            raise Refused(
                f"{shown(module)}: its factors may belong to several parameters",
                expected="the model, which determines the order of the columns of b",
                where=adapter.label,
                hint="give the model to a conversion\n"
                + command(
                    "adapterkit convert", adapter.label, to="peft", base="BASE", out="for-peft"
                ),
                code="AK402",
            )
        return None
    modules = []
    for leaf, one in factors.items():
        assert one.experts is not None
        parts = neutral_factors(
            from_spec(one.a), from_spec(one.b), one.experts,
            transpose=turns[leaf], expert_first=slowest(leaf),
        )  # fmt: skip
        name = f"{module}.{leaf}"
        inward = None
        if name in stacks:
            inward = stacks[name].transposed
        elif adapter.has_old_stacks:
            inward = not turns[leaf]
        alpha = one.scale * one.rank
        modules.append(
            AdapterModule(LANGUAGE, name, EXPERTS, parts, alpha, one.rank, inward=inward)
        )
    return modules


def _orders(
    adapter: Adapter, module: str, loras: Sequence[Lora], own: Sequence[str] | None
) -> Iterator[tuple[str, ...]]:
    """The possible parameters, the innermost first: the model's in its order, else every order."""
    leaves = adapter.leaves(module, own)
    if own is not None:
        if len(leaves) == len(loras):
            yield tuple(leaves)
    elif len(leaves) <= MOST:
        yield from itertools.permutations(leaves, len(loras))


def _factors(adapter: Adapter, loras: Sequence[Lora], order: Sequence[str]) -> dict[str, Factors]:
    """The factors of each parameter. `Refused` unless they are a stack's: not of another rank than
    the config's, a single matrix, or a convolution."""
    last = len(order) - 1
    factors = {}
    for lora in sorted(loras, key=lambda one: -one.depth):
        leaf = order[last - lora.depth]
        one = factors_of(adapter, lora, leaf)
        if one.experts is None or not len(one.a.shape) == len(one.b.shape) == 2:
            raise Refused(
                f"{shown(lora.a.key)} is not of a stack", where=adapter.label, code="AK402"
            )
        factors[leaf] = one
    return factors


def _turns(
    adapter: Adapter,
    module: str,
    factors: Mapping[str, Factors],
    words: AdapterSchema,
    stacks: Mapping[str, Stack],
    certain: bool,
) -> dict[str, bool] | None:
    """For each parameter, True if its factors are stored as those of the transposed matrices; None
    if that is unknown. `certain`: the order of the parameters is known."""
    shapes = {
        leaf: (one.experts or 1, one.a.shape[1], one.b.shape[0]) for leaf, one in factors.items()
    }
    pair = is_transposed(shapes)
    if not certain and pair is None:
        return None
    if words.a_over == "outputs":
        return dict.fromkeys(factors, True)
    turns = {}
    for leaf, (_, x, y) in shapes.items():
        stack = stacks.get(f"{module}.{leaf}")
        own: bool | None = pair
        if stack is not None and x != y:
            _, out, width = stack.shape
            if {x, y} != {out, width}:
                return None
            own = (x, y) == (out, width)
        if own is None and adapter.has_old_stacks is not None:
            if not adapter.has_old_stacks:
                own = False
            elif stack is not None:
                own = not stack.transposed
        if own is None:
            return None
        turns[leaf] = own
    return turns


def stacked_keys(
    modules: Iterable[AdapterModule], levels: Mapping[str, int]
) -> dict[str, dict[str, str]]:
    """The keys of a and b of each stack; the first stack of a module is the innermost."""
    depths: dict[str, int] = {}
    keys = {}
    for module in modules:
        home = module.name.rpartition(".")[0]
        depths[home] = depths.get(home, levels[home]) - 1
        keys[module.name] = part_keys(home, "module", levels, depths[home])
    return keys


def stacked_parts(
    module: AdapterModule, words: AdapterSchema, model: NamedBase | None
) -> dict[str, Expression]:
    """a and b of a stack in the dialect. `Refused` if they depend on the model's class, which is
    unknown."""
    transpose = False
    if words.a_over == "first axis":
        stacks = model.stacks if model is not None else {}
        inward = stacks[module.name].transposed if module.name in stacks else module.inward
        if inward is None:
            raise Refused(
                f"{shown(module.path)}: the orientation of its experts is unknown",
                expected="the model, because PEFT up to 0.18 orients them by its class",
                hint="give --base",
                code="AK402",
            )
        transpose = not inward
    return stored_factors(module.parts, transpose=transpose)

"""Join the fully trained values of adapters: copy or average them."""

import math
from collections.abc import Iterable, Mapping, Sequence

from adapterkit.core import dtypes
from adapterkit.core.adapter.keys import module_of, rewrapped_key
from adapterkit.core.adapter.record import Adapter
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.checkpoint.reader import same_bytes
from adapterkit.core.errors import Problems, shown
from adapterkit.core.merge.sites import JoinedSite
from adapterkit.core.merge.value_comparison import differing_rows
from adapterkit.core.plan import Task
from adapterkit.core.tasks.common import CopiedTensor, SummedTensor
from adapterkit.verbs.combine.methods.common import WeightedSum
from adapterkit.verbs.combine.methods.protocol import Method
from adapterkit.verbs.shared.joined_values import AdapterWeights


def trained_values(
    adapters: Sequence[Adapter], levels: Mapping[str, int], *, copies: bool = True
) -> dict[str, dict[int, TensorSpec]]:
    """The trained values that are not factors, by key and adapter number; keys are those in a file
    whose modules are wrapped `levels` times. Without `copies`, no copies of the base's weights."""
    values: dict[str, dict[int, TensorSpec]] = {}
    for adapter in adapters:
        specs = [
            spec for name, spec in adapter.replaced.items() if copies or name not in adapter.copies
        ]
        for spec in [*specs, *(tokens.values for tokens in adapter.tokens)]:
            values.setdefault(rewrapped_key(spec.key, levels), {})[adapter.number] = spec
    return values


def value_tasks(
    adapters: Sequence[Adapter],
    weights: AdapterWeights,
    method: Method,
    levels: Mapping[str, int],
    errors: Problems,
) -> list[Task]:
    """Tasks for fully trained values: copied from the one adapter of weight 1 that has them or from
    several whose values are equal, else averaged. Others join the errors."""
    if any(adapter.tokens for adapter in adapters):
        _check_rows(adapters, levels, errors)
    tasks: list[Task] = []
    for key, specs in trained_values(adapters, levels).items():
        module = module_of(key)
        if all(spec in adapters[number].copies.values() for number, spec in specs.items()):
            tasks.append(_copy_of_base(adapters, key, specs, errors))
            continue
        own_weights = [weights.of(number, module) for number in specs]
        spec, several = next(iter(specs.values())), len(specs) > 1
        shares = _shares(method, own_weights)
        stored = ((adapters[number].folder, spec) for number, spec in specs.items())
        if same_bytes(*stored) if several else shares == [1.0]:
            tasks.append(CopiedTensor(key, spec, key, checked=True))
            continue
        same_shape = len({spec.shape for spec in specs.values()}) == 1
        are_floats = all(spec.dtype in dtypes.FLOATS for spec in specs.values())
        if several and same_shape and are_floats and abs(math.fsum(shares) - 1) < 1e-9:
            terms = tuple(zip(specs.values(), shares, strict=True))
            tasks.append(SummedTensor(key, key, terms, spec.dtype, spec.shape))
            continue
        shapes = " and ".join(sorted({str(spec.shape) for spec in specs.values()}))
        names = ", ".join(
            f"{adapters[number].name} (weight {weight:g})"
            for number, weight in zip(specs, own_weights, strict=True)
        )
        errors.add(
            f"{shown(key)} {shapes}, fully trained by {names}",
            "one adapter of weight 1 that has it, equal values, or weights that add "
            "up to 1 with linear, mean or ema",
            "give other weights (--weight-for MODULE=W for this module), or leave an adapter out",
            where="adapters",
            code="AK305",
        )
    return tasks


def _shares(method: Method, weights: list[float]) -> list[float]:
    """The coefficients of the method's sum of values; empty if it is not a weighted sum of
    several."""
    if isinstance(method, WeightedSum):
        return list(method.shares(weights))
    return weights if len(weights) == 1 else []


def _copy_of_base(
    adapters: Sequence[Adapter], key: str, specs: dict[int, TensorSpec], errors: Problems
) -> Task:
    """A task that copies these adapters' value of the base's weight, in the widest dtype. No weight
    scales it; copies of two bases join the errors."""
    widest = max(specs, key=lambda number: dtypes.BITS[specs[number].dtype])
    first = (adapters[widest].folder, specs[widest])
    for number, spec in specs.items():
        is_same = spec.shape == first[1].shape and (
            number == widest or differing_rows(first, (adapters[number].folder, spec)) == 0
        )
        if not is_same:
            errors.add(
                f"{shown(key)}: copies of two bases in {adapters[widest].name} and "
                f"{adapters[number].name}",
                "adapters of one base",
                "merge them one after the other, with --embedding-copies",
                where="adapters",
                code="AK403",
            )
    return CopiedTensor(key, first[1], key, checked=True)


def check_wrappers(
    adapters: Sequence[Adapter], sites: Iterable[JoinedSite], errors: Problems
) -> None:
    """Refuse modules_to_save directly inside a module whose parameters are targets, as PEFT
    does."""
    homes = {site.module for site in sites if site.parameter}
    saved = {
        name.rpartition(".")[0]: adapter.name
        for adapter in adapters
        for name in adapter.replaced
        if adapter.saves(name)
    }
    inside = [
        f"{shown(name)} ({adapter}) inside {shown(name.rpartition('.')[0])}"
        for name, adapter in saved.items()
        if name.rpartition(".")[0] in homes
    ]
    if inside:
        errors.add(
            f"modules_to_save {'; '.join(inside[:4])}, whose parameters are targets",
            "one of both: PEFT cannot load them together",
            "merge one adapter after the other instead",
            where="adapters",
            code="AK305",
        )


def _check_rows(adapters: Sequence[Adapter], levels: Mapping[str, int], errors: Problems) -> None:
    """Refuse trained token rows unless all are the same rows, of an embedding without factors."""
    both = {
        tokens.module: a.name for a in adapters for tokens in a.tokens if levels.get(tokens.module)
    }
    rows = {a.name: a.config["trainable_token_indices"] for a in adapters if a.tokens}
    if both:
        errors.add(
            f"trained token rows of {', '.join(map(shown, both))} "
            f"({', '.join(both.values())}) with factors of the same module",
            "one of both: PEFT cannot load them together",
            "merge one adapter after the other instead",
            where="adapters",
            code="AK305",
        )
    elif any(its != next(iter(rows.values())) for its in rows.values()):
        errors.add(
            f"{', '.join(rows)} trained different token rows (trainable_token_indices)",
            "adapters that trained the same rows",
            "merge the adapters into the base\nadapterkit merge BASE ADAPTERS=W --out merged",
            where="adapters",
            code="AK305",
        )

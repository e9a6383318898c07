"""Join the sites of several adapters: the modules and single parameters that their factors act on.

A file in PEFT's layout does not name the parameters of `target_parameters`: their wrappers are
nested in the order in which the module's code creates the parameters, the first one innermost. So
the names come from the config, and the order from the model. Without a model, every order that the
files allow has to give the same result."""

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from adapterkit.core.adapter.factors import Factors, Place, factors_of
from adapterkit.core.adapter.keys import BASE_LAYER
from adapterkit.core.adapter.record import Adapter, Lora
from adapterkit.core.checkpoint.folder import Folder
from adapterkit.core.checkpoint.spec import Checkpoint
from adapterkit.core.errors import AdapterkitError, Problems, Refused, shown
from adapterkit.core.inputs.base_door import read_checkpoint
from adapterkit.core.records import Json
from adapterkit.core.weights.names import Names

MOST = 5  # parameters of one module whose orders are tried
GIVE_BASE = (
    "give --base BASE, the model they were trained on: its code has the order of the parameters"
)


class Shaped(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...


class Parameters(Protocol):
    """The parameters of a model, on disk or live."""

    @property
    def label(self) -> str: ...

    def parameter(self, name: str) -> Shaped | None: ...


@dataclass(frozen=True)
class JoinedSite:
    """A module, or one parameter of a module, and the factors that adapters have there."""

    name: str
    module: str
    parameter: bool
    # the parameter's own name; None for a module, or if the order is unknown and does not matter
    leaf: str | None
    depth: int  # number of wrappers of the module's other parameters around this one's
    members: dict[int, Factors]  # adapter's number -> its factors
    attention: str | None = None  # the MultiheadAttention whose output projection it is
    wrappers: int = 1  # number around the module, of all its parameters

    @property
    def target(self) -> str:
        """The target's name in a config, which PEFT matches patterns against."""
        if self.leaf is not None:
            return f"{self.module}.{self.leaf}"
        return self.attention or self.module

    def place(self, levels: Mapping[str, int]) -> Place:
        """Keys and shapes of its factors in a file whose modules are wrapped `levels` times."""
        return Place.of_factors(next(iter(self.members.values())), levels, self.depth)


def levels_of(sites: Collection[JoinedSite]) -> dict[str, int]:
    """The number of PEFT's wrappers around each module of a file with factors at these sites."""
    return {site.module: site.wrappers for site in sites}


def targets_of(sites: Mapping[str, JoinedSite], prefix: str = "") -> Json:
    """The fields of `Output` for its targets; `prefix`: of the tasks' names."""
    return {
        "modules": {prefix + name: site.target for name, site in sites.items()},
        "parameters": frozenset(site.target for site in sites.values() if site.parameter),
        "unnamed": frozenset(
            site.module for site in sites.values() if site.parameter and site.leaf is None
        ),
    }


def base_with_parameters(
    base: Folder | None, adapters: Sequence[Adapter], notes: list[str]
) -> Checkpoint | None:
    """The base, numbered after the adapters, if its order of parameters can matter; else add a note
    that it was not needed."""
    if base is None or any(adapter.config.get("target_parameters") for adapter in adapters):
        return None if base is None else read_checkpoint(base, len(adapters))
    notes.append(f"{base.name} was not needed: the adapters' deltas are in their factors")
    return None


def names_of(
    base: Checkpoint | None, adapters: Sequence[Adapter], notes: list[str]
) -> Names | None:
    """The names of the model that adapters were trained on, if there is a base."""
    if base is None:
        return None
    wanted: dict[str, None] = {}
    for adapter in adapters:
        for lora in adapter.loras:
            leaves = adapter.leaves(lora.module)
            wanted |= dict.fromkeys(f"{lora.module}.{leaf}" for leaf in leaves or ["weight"])
    trained = adapters[0].trained_class
    return Names(base, tuple(wanted), *trained, build_model=True, notes=notes)


def join(
    adapters: Sequence[Adapter], errors: Problems, names: Names | None = None
) -> dict[str, JoinedSite]:
    """The sites of all adapters by name; `names`: the model's, if there is a base. Sites that
    cannot be joined are added to the errors."""
    of, by_module = {adapter.number: adapter for adapter in adapters}, {}
    for adapter in adapters:
        for lora in adapter.loras:
            by_module.setdefault(lora.module, {}).setdefault(adapter.number, []).append(lora)
    sites: dict[str, JoinedSite] = {}
    for module, loras in by_module.items():
        own = names.children(module) if names is not None else None
        leaves = {number: of[number].leaves(module, own) for number in loras}
        with errors.collected():
            is_nested = any(lora.depth for its in loras.values() for lora in its)
            if not is_nested and not any(leaves.values()):
                sites[module] = _module(module, {n: its[0] for n, its in loras.items()}, of)
            else:
                _check_parameters(module, loras, leaves, of)
                parameter_sites = sites_of(module, loras, leaves, of, own, names)
                sites |= {site.name: site for site in parameter_sites}
    _check_nests(sites.values(), errors)
    _check_layouts(sites.values(), adapters, errors)
    return sites


def _module(module: str, loras: dict[int, Lora], of: dict[int, Adapter]) -> JoinedSite:
    members, errors = {}, Problems()
    for number, lora in loras.items():
        with errors.collected():
            members[number] = factors_of(of[number], lora)
    errors.raise_all()
    if len({(one.kind, one.shape, one.a.shape[1:]) for one in members.values()}) > 1:
        raise _other_shapes(module, members, of)
    attention = next((path for n, lora in loras.items() if (path := of[n].attention(lora))), None)
    return JoinedSite(module, module, False, None, 0, members, attention)


def _other_shapes(name: str, members: dict[int, Factors], of: dict[int, Adapter]) -> Refused:
    shapes = [f"{of[n].name}: {factors.kind} {factors.shape}" for n, factors in members.items()]
    hint = "combine adapters of one base"
    return Refused(
        f"{shown(name)}: {'; '.join(shapes)}",
        expected="one shape",
        where="adapters",
        hint=hint,
        code="AK305",
    )


def _check_parameters(
    module: str, loras: dict, leaves: dict[int, list[str]], of: dict[int, Adapter]
) -> None:
    """Refuse adapters that target one module in different ways, or have wrappers of parameters that
    their config does not name."""
    lacking = [
        of[n].name for n, its in loras.items() if not leaves[n] and any(lora.depth for lora in its)
    ]
    if lacking:
        raise Refused(
            f"{shown(module)} has wrappers of its parameters, target_parameters names none of them",
            expected="their names",
            where=", ".join(lacking),
            hint="give target_parameters in adapter_config.json as they were in training",
            code="AK305",
        )
    plain = [
        of[n].name
        for n in loras
        if not leaves[n] or any(lora.kind != "module" for lora in loras[n])
    ]
    if plain:
        raise Refused(
            f"{shown(module)} is a target itself in {', '.join(plain)}, and has "
            "target_parameters in the others",
            expected="one way for all: PEFT cannot load both",
            where="adapters",
            hint="merge one after the other instead",
            code="AK305",
        )


def sites_of(
    module: str,
    loras: dict[int, list[Lora]],
    leaves: dict[int, list[str]],
    of: dict[int, Adapter],
    own: list[str] | None,
    names: Parameters | None,
) -> list[JoinedSite]:
    """The parameters of one module, the innermost first; `Refused` if neither the files nor the
    model determine their order."""
    holders = [
        (leaves[number], 1 + max(lora.depth for lora in its)) for number, its in loras.items()
    ]
    union = list(dict.fromkeys(leaf for named, _ in holders for leaf in named))
    results: dict[tuple, list[list[JoinedSite]]] = {}
    failure: AdapterkitError | None = None
    if own is None and len(union) > MOST:
        raise _undecided(module, loras, union, of)
    for chosen in _arrangements(holders, union, own):
        try:
            sites = _arranged(module, chosen, loras, leaves, of, names)
        except AdapterkitError as error:
            failure = failure or error
            continue
        results.setdefault(_signature(sites), []).append(sites)
    if not results:
        depth = max(levels for _, levels in holders)
        raise failure or Refused(
            f"{shown(module)}: {depth} wrappers of parameters, {len(union)} names for them "
            f"({', '.join(map(shown, union))})",
            expected="a name in target_parameters for each",
            where=", ".join(of[number].where for number in loras),
            hint="restore the config that was saved with the file",
            code="AK303",
        )
    if len(results) > 1:
        raise _undecided(module, loras, union, of)
    (orders,) = results.values()
    if len(orders) == 1:
        return orders[0]
    several = f"{module}[{','.join(sorted(union))}]"
    return [replace(site, name=several + BASE_LAYER * site.depth, leaf=None) for site in orders[0]]


def _undecided(module: str, loras: dict, union: list[str], of: dict[int, Adapter]) -> Refused:
    return Refused(
        f"{shown(module)}: which factors are those of {', '.join(map(shown, union))}",
        expected="files that say so (PEFT's name the nesting, not the parameter)",
        where=", ".join(of[number].name for number in loras),
        hint=GIVE_BASE,
        code="AK402",
    )


def _signature(sites: list[JoinedSite]) -> tuple:
    """The properties of a result that do not depend on the parameters' names."""
    return tuple(
        (
            site.depth,
            *sorted(
                (n, factors.depth, factors.scale, factors.rank, factors.experts or 1)
                for n, factors in site.members.items()
            ),
        )
        for site in sites
    )


def _arrangements(
    holders: list[tuple[list[str], int]], union: list[str], own: list[str] | None
) -> Iterator[tuple[str, ...]]:
    """The possible lists of a module's wrapped parameters, the innermost first. With a model, its
    own parameters in its order. Without one, every choice and order of names that gives each
    adapter its number of wrappers."""
    if own is not None:
        yield tuple(leaf for leaf in own if leaf in union)
        return
    for count in range(1, len(union) + 1):
        for chosen in itertools.permutations(union, count):
            if all(sum(leaf in named for leaf in chosen) == levels for named, levels in holders):
                yield chosen


def _arranged(
    module: str,
    chosen: tuple[str, ...],
    loras: dict[int, list[Lora]],
    leaves: dict[int, list[str]],
    of: dict[int, Adapter],
    names: Parameters | None,
) -> list[JoinedSite]:
    """The sites if these are the parameters, in this order; `Refused` if the files contradict
    it."""
    members: dict[str, dict[int, Factors]] = {leaf: {} for leaf in chosen}
    for number, its in loras.items():
        own_leaves = [leaf for leaf in chosen if leaf in leaves[number]]
        for lora in its:
            if lora.depth >= len(own_leaves):
                raise Refused(
                    f"{shown(lora.a.key)} is inside {lora.depth + 1} wrappers, {len(own_leaves)} "
                    "parameters of its module are targets",
                    expected="a wrapper for each",
                    where=of[number].where,
                    hint="restore the config that was saved with the file",
                    code="AK303",
                )
            leaf = own_leaves[len(own_leaves) - 1 - lora.depth]
            members[leaf][number] = factors_of(of[number], lora, leaf)
    for leaf, its in members.items():
        if len({(one.shape, one.experts) for one in its.values()}) > 1:
            raise _other_shapes(f"{module}.{leaf}", its, of)
        if names is not None:
            _check_shape(module, leaf, its, names)
    last = len(chosen) - 1
    return [
        JoinedSite(
            f"{module}.{leaf}", module, True, leaf, last - i, members[leaf], wrappers=len(chosen)
        )
        for i, leaf in enumerate(chosen)
        if members[leaf]
    ]


def _check_shape(module: str, leaf: str, members: dict[int, Factors], names: Parameters) -> None:
    parameter = names.parameter(f"{module}.{leaf}")
    shape = None if parameter is None else tuple(parameter.shape)
    for factors in members.values():
        stack = (
            (factors.experts,)
            if shape and len(shape) == 3 and factors.experts
            else (1,)[: len(shape or ()) - 2]
        )
        if (
            shape is None
            or len(shape) not in (2, 3)
            or set(shape[-2:]) != set(factors.shape)
            or shape[:-2] != stack
        ):
            raise Refused(
                f"{shown(factors.a.key)}: factors of {factors.shape}",
                expected=(
                    f"ones that fit {shown(module)}.{shown(leaf)} "
                    f"{shape or 'of the base, which has none'}"
                ),
                where=names.label,
                hint="check that the adapter was trained on this base",
                code="AK401",
            )


def _check_nests(sites: Collection[JoinedSite], errors: Problems) -> None:
    """Refuse parameters of a module inside another module whose parameters are wrapped: PEFT cannot
    load them."""
    modules = {site.module for site in sites if site.parameter}
    inner = [(one, other) for one in modules for other in modules if one.startswith(f"{other}.")]
    if inner:
        some = (f"{shown(one)} inside {shown(other)}" for one, other in sorted(inner)[:4])
        errors.add(
            f"parameters of {'; '.join(some)} are targets",
            "no such nest: PEFT cannot load it",
            "merge one adapter after the other instead",
            where="adapters",
            code="AK305",
        )


def flips_square_experts(
    adapter: Adapter, name: str, transposed: bool, layout: str | None, hint: str
) -> bool:
    """Return whether b @ a is transposed on square experts, whose shapes fit both ways. PEFT up to
    0.18 read all stacks as (in, out); later versions use the module's class (`transposed`).

    `layout`: "peft-0.18" or "peft-0.19"; None takes it from the adapter's version, and raises
    `Refused` if that is unknown."""
    old = adapter.has_old_stacks
    if layout is None and old is not None:
        layout = "peft-0.18" if old else "peft-0.19"
    if layout is None:
        raise Refused(
            f"{shown(name)} has square experts and the adapter has no peft_version",
            expected="the layout in which PEFT wrote it: it changed in 0.19",
            where=adapter.where,
            hint=hint,
            code="AK402",
        )
    return layout == "peft-0.18" or transposed


def _check_layouts(
    sites: Collection[JoinedSite], adapters: Sequence[Adapter], errors: Problems
) -> None:
    """Refuse square stacks from two versions of PEFT: each may be the other's transpose, and their
    shapes fit both ways."""
    square = [
        site.name
        for site in sites
        if any(f.experts and f.shape[0] == f.shape[1] for f in site.members.values())
    ]
    stacked = [adapter for adapter in adapters if adapter.config.get("target_parameters")]
    if square and len({adapter.has_old_stacks for adapter in stacked}) > 1:
        errors.add(
            f"{shown(square[0])} has square experts, and PEFT transposed them in 0.19",
            "adapters of PEFT below 0.19 alone, or none of them",
            "train or convert the adapters with one version of PEFT",
            where=", ".join(dict.fromkeys(adapter.name for adapter in stacked)),
            code="AK305",
        )

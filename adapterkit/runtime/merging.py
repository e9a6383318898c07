"""Merge adapters on a live model: W + Σ weight·scale·b·a in float32, rounded once; the old weights
are kept, so that unmerging is exact."""

import copy
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from adapterkit.core.engine.device import float32_products
from adapterkit.core.errors import AdapterkitError, Problems, Refused, by_reason, listed, shown
from adapterkit.core.inputs.model_config import SWITCH, has_other_effects
from adapterkit.runtime.patches.factors import FactorsPatch
from adapterkit.runtime.quantized import exchange, quantization_of, rounded, tensors_of, weight_of
from adapterkit.runtime.site import Patch, Site, owner
from adapterkit.runtime.state import State
from adapterkit.runtime.weights import weight_on


@dataclass
class ReplacedWeights:
    """The weights of a model that a merge replaced, with their old values."""

    active: dict[str, float]  # the active adapters before
    replaced: list[tuple[nn.Module, str, Tensor]] = field(default_factory=list)
    tied: bool | None = None  # the config's tie_word_embeddings, where a tie was broken

    def swap(self) -> None:
        """Exchange the merged and the original weights, also if the model has moved since."""
        if any(tensors_of(host, leaf)[leaf].is_meta for host, leaf, _ in self.replaced):
            raise Refused(
                "weights that were offloaded after the merge",
                expected="weights in memory",
                where="merge",
                hint="remove the hooks that offload them, then unmerge",
                code="AK802",
            )
        old, self.replaced, present = self.replaced, [], dict[int, Tensor]()
        for host, leaf, value in old:
            self.replaced.append((host, leaf, exchange(host, leaf, present.get(id(value), value))))
            present[id(value)] = tensors_of(host, leaf)[leaf]  # those that are tied stay one


class HostWeights(dict[str, Tensor]):
    """A host's parameters by name, in float32, read on first use; patches change them."""

    def __init__(self, host: nn.Module):
        super().__init__()
        self.host = host

    def __missing__(self, name: str) -> Tensor:
        module, leaf = owner(self.host, name)
        if leaf == "weight" and quantization_of(module) is not None:
            self[name] = weight_of(module)
            return self[name]
        parameter = module._parameters.get(leaf)
        if parameter is None:
            raise KeyError(name)
        wide = torch.promote_types(parameter.dtype, torch.float32)
        self[name] = parameter.detach().to(wide, copy=True)
        return self[name]


@torch.no_grad()
@float32_products()
def merge(state: State, table: Mapping[str, float]) -> None:
    """Merge adapters into the base's weights; `Refused` if impossible, before a change."""
    check(state, table)
    done = ReplacedWeights(dict(state.active))
    merged: dict[int, list[Tensor]] = {}  # parameters by the original's id
    own: list[tuple[Site, str, Tensor]] = []
    sites = {path: site for name in table for path, site in state.adapters[name].sites.items()}
    for site in sites.values():
        values = HostWeights(site.host)
        patches = [(p, w) for name, w in table.items() for p in site.own_patches(name)]
        site.select(table)  # for patches that replace the host's values
        replacements = site.replacements
        try:
            for patch, weight in sorted(patches, key=lambda pair: not pair[0].replaces):
                acts, factor = patch.weighted(weight)
                acts.merge(values, factor)
        finally:
            site.select(state.active)
        for name, value in values.items():
            module, leaf = owner(site.host, name)
            for other, new in rounded(module, leaf, value).items():
                original = tensors_of(module, other)[other]
                if type(original) is nn.Parameter:  # a quantized one has more than its values
                    # weights stay tied if their values are the same
                    others = merged.setdefault(id(original), [])
                    new = next((tied for tied in others if torch.equal(tied, new)), new)
                    others.append(new)
                if isinstance(original, nn.Parameter):
                    place = f"{name.removesuffix(leaf)}{other}"
                    own.append((site, place, replacements.get(place, original)))
                done.replaced.append((module, other, new))
    breaks = _breaks_ties(state, done, merged)
    if breaks:
        _check_untying(state.model)
    done.swap()
    if breaks:
        _untie(state.model, done)
    for site, name, original in own:
        site.unmerged[name] = original
    state.merge = done
    state.merged = dict(table)
    state.select({name: w for name, w in state.active.items() if name not in table})


def unmerge(state: State) -> None:
    """Restore the base's own weights, bit for bit, and the previously active adapters."""
    if state.merge is None:
        raise Refused(
            "nothing is merged",
            expected="merged adapters",
            where="unmerge",
            hint="merge first",
            code="AK802",
        )
    done = state.merge
    done.swap()
    for site in state.sites.values():
        site.unmerged.clear()
    if done.tied is not None:
        # nn.Module types every attribute as Tensor or Module
        state.model.config.tie_word_embeddings = done.tied  # type: ignore[union-attr]
    state.merge, state.merged = None, {}
    state.select(done.active)


@contextmanager
def without_merge(state: State) -> Iterator[None]:
    """Restore the base's own weights while the block runs."""
    if state.merge is None:
        yield
        return
    state.merge.swap()
    try:
        yield
    finally:
        state.merge.swap()


def check(state: State, table: Mapping[str, float]) -> None:
    """`Refused` for merged adapters, and for patches that no weight equals."""
    errors = Problems(where="merge", code="AK802")
    if not table:
        errors.add("no adapter", "one or more", "name the adapters")
    if state.merge is not None:
        errors.add(
            f"{', '.join(map(shown, state.merged))} already merged",
            "one merge at a time",
            "unmerge first, then merge all of them together",
        )
    if state.replication is not None:
        errors.add(
            "replicated layers, whose copies share weights",
            "layers with weights of their own",
            "`adapterkit merge` writes the deeper model; or run it unmerged",
        )
    errors += conflicts(state, [*table, *state.active], "merge")
    errors += wrong_sums(state, {**state.active, **table})
    _add_covered(state, table, errors)
    for name, weight in table.items():
        errors += state.guard.hosts.problems(state.adapters[name].sites.values(), "merge")
        patches = state.adapters[name].patches()
        reasons = by_reason(
            (site.path, _unmergeable(site, patch, weight)) for site, patch in patches
        )
        for reason, paths in reasons.items():
            problem = f"{shown(name)} cannot be merged into {listed(paths)}: {reason}"
            errors.add(problem, "low-rank factors on plain weights", "run it unmerged")
    errors.raise_all()


def _unmergeable(site: Site, patch: Patch, weight: float) -> str | None:
    if any(parameter.is_meta for parameter in site.host.parameters()):
        return "the weights are offloaded, or on the meta device"
    acts, factor = patch.weighted(weight)
    return acts.unmergeable(site, factor)


def _add_covered(state: State, table: Mapping[str, float], errors: Problems) -> None:
    """Refuse values that would still replace weights that the merge changes."""
    for name in state.active.keys() - table.keys():
        paths = [
            site.path
            for site, patch in state.adapters[name].patches()
            if patch.replaces and any(patch.covers(p) for m in table for p in site.own_patches(m))
        ]
        if paths:
            values = f"replaces values of {listed(paths)}"
            errors.add(
                f"{shown(name)}, which stays active, {values}",
                "merged weights that act",
                "merge it too, or activate only the other adapters first",
                code="AK802",
            )


def _breaks_ties(state: State, done: ReplacedWeights, merged: Mapping[int, list[Tensor]]) -> bool:
    """Return whether a replaced weight is tied to a module that keeps it or gets another value."""
    places = {(id(module), leaf) for module, leaf, _ in done.replaced}
    left = any(
        id(parameter) in merged and (id(module), leaf) not in places
        for module in state.model.modules()
        for leaf, parameter in module._parameters.items()
    )
    return left or any(len({*map(id, values)}) > 1 for values in merged.values())


def _check_untying(model: nn.Module) -> None:
    """`Refused` if the model's code uses the config's switch for more than tying."""
    if not getattr(getattr(model, "config", None), SWITCH, False):
        return
    configs: list[Any] = [copy.deepcopy(model.config) for _ in range(2)]
    setattr(configs[1], SWITCH, False)
    # as a save and a load would build it
    configs = [type(config).from_dict(config.to_dict()) for config in configs]
    with torch.device("meta"):
        both = [type(model)(config) for config in configs]
    if has_other_effects(*both):
        raise Refused(
            f"one side of the tied weights of a {type(model).__name__}, whose code does more "
            f"with {SWITCH} than tie",
            expected="a change of both sides, or of neither",
            where="merge",
            hint="run it unmerged, or exclude the embedding and the head from targets",
            code="AK802",
        )


def _untie(model: nn.Module, done: ReplacedWeights) -> None:
    """Set the config to untied, because saving and loading would otherwise tie the weights
    again."""
    config = getattr(model, "config", None)
    if config is not None and getattr(config, SWITCH, False):
        done.tied = getattr(config, SWITCH)
        setattr(config, SWITCH, False)


def conflicts(state: State, names: Iterable[str], where: str) -> list[AdapterkitError]:
    """Refusals of adapters that give different values to the same parameters."""
    names = list(dict.fromkeys(names))
    errors = Problems(where=where, hint="use one of them at a time", code="AK802")
    expected = "one adapter for each trained value"
    trained = [name for name in names if state.adapters[name].config.bias != "none"]
    if len(trained) > 1:
        errors.add(f"{', '.join(map(shown, trained))} have trained biases", expected)
    clashes: dict[tuple[str, str, str], list[str]] = {}
    for path, patches in _special(state, names).items():
        for patch, other in combinations(patches, 2):
            reason = patch.adapter != other.adapter and (patch.clash(other) or other.clash(patch))
            if reason:
                clashes.setdefault((patch.adapter, other.adapter, reason), []).append(path)
        for patch in patches:
            if patch.role == "copy":
                for other, inner in _inside(state, names, path, patch):
                    reason = f"a trained copy of {shown(path)}, and modules inside it"
                    clashes.setdefault((patch.adapter, other, reason), []).append(inner)
    for (first, second, reason), paths in clashes.items():
        errors.add(f"{shown(first)} and {shown(second)} have {reason}: {listed(paths)}", expected)
    return errors


def wrong_sums(state: State, table: Mapping[str, float]) -> list[AdapterkitError]:
    """Problems of adapters of one changed base that restore its initial factors wrongly with these
    weights."""
    marked = {n: one for n, one in state.adapters.items() if n in table and one.base_change}
    if not marked:
        return []
    from adapterkit.core.merge.initial_factors import by_change
    from adapterkit.core.merge.initial_factors import wrong_sums as problems_of

    errors = Problems()
    for change, adapters in by_change(marked.values()).items():
        sums: dict[str, float] = {}
        for adapter in adapters:
            for site, patch in adapter.patches():
                if isinstance(patch, FactorsPatch):
                    weight = weight_on(table[adapter.name], module := patch.named(site.path))
                    weight = math.nan if isinstance(weight, tuple) else weight * adapter.rescaled
                    sums[module] = sums.get(module, 0.0) + weight
        names = listed([adapter.name for adapter in adapters])
        errors += problems_of(change, sums, names, "give weights that add up to 1")
    return errors


def _special(state: State, names: list[str]) -> dict[str, list[Patch]]:
    """The patches of these adapters that do more than add to a module's output, by module."""
    special: dict[str, list[Patch]] = {}
    for name in names:
        for site, patch in state.adapters[name].patches():
            if not patch.role.startswith("delta"):
                special.setdefault(site.path, []).append(patch)
    return special


def _inside(state: State, names: list[str], path: str, copy: Patch) -> Iterable[tuple[str, str]]:
    """The other adapters with patches inside a module that is copied, and the paths."""
    for name in names:
        if name != copy.adapter:
            for inner in state.adapters[name].sites:
                if inner.startswith(f"{path}."):
                    yield name, inner

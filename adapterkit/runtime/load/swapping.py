"""Swap an adapter's weights in place, so that compiled code keeps working."""

import torch

from adapterkit.core.errors import Problems, shown
from adapterkit.core.options import StrPath
from adapterkit.runtime.layers.alora import InvokedPatch
from adapterkit.runtime.load.reading import read, take_base
from adapterkit.runtime.patches.factors import FactorsPatch
from adapterkit.runtime.replication import replicating
from adapterkit.runtime.site import Patch
from adapterkit.runtime.state import State

Patches = dict[tuple[int, str], tuple[str, Patch]]  # by host and role, with the module's path
VALUES = ("bias", "magnitude", "initial_a", "initial_b")  # optional attributes of factors


@torch.no_grad()
def swap(state: State, name: str, source: StrPath) -> None:
    """Give an adapter the weights, ranks and scales of another one from disk; `Refused` with every
    mismatch, before anything changes. Modules that the new one lacks get zeros."""
    state.known([name])
    state.outside_rows("swap")
    state.own_weights("swap")
    adapter = state.adapters[name]
    with replicating(state):
        stored, patches = read(state, source, name, None)
    new: Patches = {
        (id(state.modules[patch.place(path)]), patch.role): (path, patch) for path, patch in patches
    }
    old: Patches = {
        (id(site.host), patch.role): (site.path, patch) for site, patch in adapter.patches()
    }
    _check(old, new, stored.adapter.label)
    take_base(state, adapter, stored.adapter)
    for key, (_, patch) in old.items():
        other = new.get(key)
        if isinstance(patch, FactorsPatch):
            _copy_factors(patch, None if other is None else other[1])
        elif other is not None:
            values = other[1].tensors()
            for leaf, value in patch.tensors().items():
                value.copy_(values[leaf])
        if isinstance(patch, InvokedPatch):
            patch.invocations.tokens[name] = tuple(stored.config.invocation_tokens or ())
        patch.site.renew()
    adapter.config = stored.config


def _copy_factors(patch: FactorsPatch, new: Patch | None) -> None:
    if new is None:
        patch.a.zero_()
        patch.b.zero_()
        patch.set_own(0, 0.0)
        if patch.bias is not None:
            patch.bias.zero_()
        if patch.magnitude is not None:
            patch.magnitude.copy_(patch.row_norms(patch.host).view_as(patch.magnitude))
        return
    assert isinstance(new, FactorsPatch)
    patch.dropout = new.dropout
    for leaf, axis in zip("ab", patch.rank_axes, strict=True):
        value, other = getattr(patch, leaf), getattr(new, leaf)
        value.zero_()
        value.narrow(axis, 0, other.shape[axis]).copy_(other)
    patch.set_own(new.rank, new.stored_scale)
    for leaf in VALUES:
        value, other = getattr(patch, leaf), getattr(new, leaf)
        if value is not None:
            value.copy_(other)


def _check(old: Patches, new: Patches, where: str) -> None:
    """`Refused` for modules that the old adapter lacks, other kinds, and higher ranks."""
    errors = Problems(where=where, hint="load it under a name of its own", code="AK803")
    for key, (path, patch) in new.items():
        if key in old:
            _compare(path, old[key][1], patch, errors)
        else:
            problem = f"{shown(path)}is not in the old adapter"
            errors.add(problem, "modules of the old adapter, all or some")
    for key, (path, patch) in old.items():
        if key not in new and not isinstance(patch, FactorsPatch):
            problem = f"{shown(path)} has {patch.role} values and the new adapter none"
            errors.add(problem, "the same kinds of values")
    errors.raise_all()


def _compare(path: str, old: Patch, new: Patch, errors: Problems) -> None:
    at = f"at {shown(path)}"
    if not isinstance(old, FactorsPatch) or not isinstance(new, FactorsPatch):
        before, after = (
            {leaf: tuple(value.shape) for leaf, value in patch.tensors().items()}
            for patch in (old, new)
        )
        if type(old) is not type(new) or before != after:
            errors.add(f"{after} {at}", f"{before}", code="AK803")
        elif any(
            not value.is_floating_point() and not torch.equal(value, other)
            for value, other in zip(old.buffers(), new.buffers(), strict=True)
        ):
            errors.add(f"other rows {at}", "rows of the same tokens", code="AK803")
        return
    kinds = [
        [type(p).__name__, *(leaf for leaf in VALUES if getattr(p, leaf) is not None)]
        for p in (old, new)
    ]
    if kinds[0] != kinds[1]:
        before, after = (" with ".join(kind) for kind in kinds)
        errors.add(f"{after} {at}", before, code="AK803")
    elif old.initial_a is not None and new.initial_a is not None:
        before, after = tuple(old.initial_a.shape), tuple(new.initial_a.shape)
        if before != after:
            errors.add(f"initial factors {after} {at}", f"{before}", code="AK803")
    rows = old.a.shape[old.rank_axes[0]] if old.can_be_padded else old.rank
    if new.rank > rows or (new.rank < rows and not old.can_be_padded):
        expected = f"at most {rows}" if old.can_be_padded else f"{rows}"
        hint = "load the first one with pad_rank= the highest rank that you will swap in"
        errors.add(f"rank {new.rank} {at}", expected, hint, code="AK803")

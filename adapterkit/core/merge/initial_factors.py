"""Adapters of one changed base: each of them contains the initial factors that this base lacks.

W' = W - s·b₀@a₀ plus Σ wᵢ·(s·b₀@a₀ + learnedᵢ) is W + Σ wᵢ·learnedᵢ only if Σ wᵢ = 1."""

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Protocol, TypeVar

from adapterkit.core.adapter.record import Adapter
from adapterkit.core.checkpoint.header import Header
from adapterkit.core.checkpoint.spec import Checkpoint
from adapterkit.core.commands import WITHOUT_INITIAL, command
from adapterkit.core.errors import Problems, listed, shown
from adapterkit.core.merge.job import MergeState
from adapterkit.core.outputs.changed_base import CHANGED_BY, changes_of, unmarked

# key of the metadata of a base to which an earlier merge added the initial factors again
RESTORED = "adapterkit_restored_by"
UNNAMED = "an init that names no base"  # PEFT's own
ROUNDING = 1e-6  # of a sum of weights

Sums = dict[str, float]  # the sum of weights on a module


class OfChangedBase(Protocol):
    """An adapter, in a file or on a model."""

    @property
    def base_change(self) -> str | None: ...


A = TypeVar("A", bound=OfChangedBase)


def by_change(adapters: Iterable[A]) -> dict[str, list[A]]:
    """Return the adapters of each changed base, by the name of the change."""
    groups: dict[str, list[A]] = {}
    for adapter in adapters:
        if adapter.base_change:
            groups.setdefault(adapter.base_change, []).append(adapter)
    return groups


def wrong_sums(change: str, sums: Sums, where: str, hint: str) -> Problems:
    """Return the problem of modules on which the weights of the adapters of a changed base do not
    add up to 1."""
    errors = Problems(where=where, code="AK304")
    wrong = {module: one for module, one in sums.items() if not abs(one - 1) <= ROUNDING}
    if wrong:
        found = sorted({f"{one:g}" for one in wrong.values()})
        errors.add(
            f"the weights of the adapters of {change} add up to {listed(found)} on "
            f"{listed(list(wrong))}: the base lacks the initial factors, and each of these "
            "adapters contains them",
            "weights that add up to 1 on each module",
            hint,
        )
    return errors


def check(state: MergeState) -> None:
    """Refuse a merge after which a weight lacks the initial factors, or contains them twice. The
    files of the output get the mark of their new state."""
    marks: dict[str, str] = {}
    name, options = state.original.name, state.options
    in_base, restored = changes_of(state.original), changes_of(state.original, RESTORED)
    groups = by_change(state.adapters)
    unnamed = [one for one in state.adapters if one.changed_base() and not one.base_change]
    if options.base_is_residual and unnamed:
        groups[UNNAMED] = unnamed
    for change, adapters in groups.items():
        first, sums = adapters[0], _sums(state, adapters)
        is_restored = change in restored
        if change is not UNNAMED:
            marks[CHANGED_BY if is_restored else RESTORED] = change
        errors = Problems(where=first.where, hint=WITHOUT_INITIAL, code="AK304")
        if not is_restored and not options.base_is_residual:
            errors += unmarked(first, in_base, name)
        if state.methods is not None:
            errors.add(
                f"--method {options.method} and initial factors of {change} in {first.name}",
                "a sum: no other method restores these factors",
            )
        elif not is_restored:
            errors += wrong_sums(change, sums, first.where, _hint(state, adapters))
        elif any(abs(one + 1) > ROUNDING for one in sums.values()):  # no merge is undone
            errors.add(
                f"{shown(name)} has an adapter of {change} with its initial factors in it already; "
                f"{first.name} adds them once more",
                "the changed base without an adapter",
            )
        state.errors += errors
    if marks and state.original.in_safetensors:
        state.headers = _marked(state.original, marks)


def _sums(state: MergeState, adapters: list[Adapter]) -> Sums:
    """The sum of the adapters' weights on each of their modules, as the job has planned it."""
    numbers = {one.number for one in adapters}
    sums = {(lora.module, lora.depth): 0.0 for one in adapters for lora in one.loras}
    names = {at: at[0] for at in sums}
    for name, change in state.changes.items():
        for factors in change.additions:
            if (number := factors.a.folder) in numbers:
                at = factors.module, factors.depth
                names[at] = name.removesuffix(".weight")
                # weights of directions have no one sum
                sums[at] += math.nan if factors.directions else change.weights[number]
    return {names[at]: one for at, one in sums.items()}


def _hint(state: MergeState, adapters: list[Adapter]) -> str:
    """The command with equal weights if it has no other adapters; else that of `rebase`."""
    options = state.options
    selects = options.include or options.exclude or options.weight_for or options.lbw or state.file
    if selects or len(adapters) < len(state.adapters):
        return WITHOUT_INITIAL
    share = f"{1 / len(adapters):.9g}"
    text = "give weights that add up to 1, or make plain LoRAs of them by `adapterkit rebase`"
    given = {"base_is_residual": options.base_is_residual, "out": "merged"}
    return text + "\n" + command("adapterkit merge", "BASE", f"ADAPTERS={share}", **given)


def _marked(base: Checkpoint, marks: dict[str, str]) -> dict[str, Header]:
    """The headers of the base's files, with these marks instead of the others of these changes."""
    headers, keys = {}, (CHANGED_BY, RESTORED)
    for name, header in base.shards.items():
        metadata = {"format": "pt"} if not header.metadata else dict(header.metadata)
        metadata = {k: v for k, v in metadata.items() if k not in keys or v not in marks.values()}
        headers[name] = replace(header, metadata=metadata | marks, raw=b"")
    return headers

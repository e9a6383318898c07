"""Tied embeddings: parameters that are one in memory, kept tied, untied or folded."""

import inspect
import math
from collections.abc import Iterable, Iterator
from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np

from adapterkit.checkpoint.header import TensorSpec
from adapterkit.errors import Refused, shown
from adapterkit.planning.merge.job import Change, Job, Part, nested
from adapterkit.weights.skeleton import tied_names

Sides = dict[
    str, Change
]  # name -> what PEFT computes with under it, for the names of one tied parameter


def settle_ties(job: Job) -> None:
    """Parameters that are one in memory: untie those whose sides are not changed alike, unless told otherwise."""
    if job.names.model is None:
        _check_unseen(job)
    apart: dict[tuple[str, ...], Sides] = {}
    for group in _groups(job):
        changed = [name for name in group if name in job.changes]
        if not changed:
            continue
        sides = _sides(job, group)
        if _alike(job, group, sides):
            _set_all(job, group, sides[group[0]])
        elif job.options.tied == "refuse":
            job.errors.append(
                Refused(
                    f"{shown(changed[0])} is tied to {shown(', '.join(name for name in group if name != changed[0]))}",
                    expected="a change of both or of neither (--tied refuse)",
                    where="adapters",
                    hint="give --tied untie to make them two, or --tied fold for PEFT's in-memory result",
                )
            )
        elif job.options.tied == "fold" and _foldable(job, changed):
            _set_all(job, group, _sum(job, changed))
        else:
            apart[group] = sides
    if apart:
        _untie(job, apart)
    _note_biases(job)


def _check_unseen(job: Job) -> None:
    """Without the model nobody knows what is tied to an embedding; a config that speaks of ties is not passed over."""
    sizes = {size for size in nested(job.base.config, "vocab_size") if isinstance(size, int)}
    names = [
        name
        for name, change in job.changes.items()
        if change.parameter.shape[:1] and change.parameter.shape[0] in sizes
    ]
    if (
        names
        and True in nested(job.base.config, "tie_word_embeddings")
        and job.options.tied != "fold"
    ):
        job.errors.append(
            Refused(
                f"{', '.join(map(shown, names))} may have other names: the config says tie_word_embeddings, and transformers "
                "cannot build the model",
                expected="a model that transformers knows",
                where=job.base.name,
                hint="update transformers, or give --tied fold to change what is tied to it as well",
            )
        )


def _note_biases(job: Job) -> None:
    """A head with a bias and trained token rows: PEFT 0.21 computes it without the bias before a merge, and with it after one."""
    for name, change in {**job.changes, **job.new}.items():
        heads = [
            n
            for n in (name, *change.parameter.tied)
            if change.rows and job.names.layer(n.rpartition(".")[0]) == "Linear"
        ]
        for head in heads:
            if job.names.parameter(f"{head.rpartition('.')[0]}.bias") is not None:
                job.notes.append(
                    f"{shown(head)} has trained rows and a bias: PEFT leaves that out until it merges, here it counts"
                )


def _groups(job: Job) -> list[tuple[str, ...]]:
    """The names of each parameter that has several, the stored one first."""
    parameters = job.names.model.parameters if job.names.model is not None else {}
    groups = {
        frozenset((name, *parameter.tied))
        for name, parameter in parameters.items()
        if parameter.tied
    }
    return sorted(
        tuple(sorted(group, key=lambda name: (not _is_stored(job, name), name))) for group in groups
    )


def _is_stored(job: Job, name: str) -> bool:
    parameter = job.names.parameter(name)
    return parameter is not None and not parameter.is_alias


def _sides(job: Job, group: tuple[str, ...]) -> Sides:
    """What PEFT computes with under each name of a parameter.

    An adapter's token rows at the input embedding are all sides', unless it trained rows at another side too; and so are values
    that are no module of their own (a resized embedding), where a side has none.
    """
    own = {name: job.changes[name] for name in group if name in job.changes}
    rows_of: dict[int, list[str]] = {}  # adapter -> the names at which it trained rows
    for name, change in own.items():
        for values, _ in change.rows:
            rows_of.setdefault(values.folder, []).append(name)
    sides: Sides = {}
    for name in group:
        parameter = job.names.parameter(name)
        assert parameter is not None
        known = own.get(name) or Change(parameter)
        side = sides[name] = replace(known, rows=[*known.rows], adapters=[*known.adapters])
        for source, change in own.items():
            follows = source != name and _is_input(job, source) and name in _followers(job)
            rows = [row for row in change.rows if follows and rows_of[row[0].folder] == [source]]
            shared = side.value is None and change.value is not None and not _saved(job, source)
            if shared:
                side.value, side.number = change.value, change.number
                side.parameter = replace(side.parameter, shape=change.parameter.shape)
            side.rows += rows
            if rows or shared:
                side.adapters += [
                    adapter for adapter in change.adapters if adapter not in side.adapters
                ]
    return sides


def _followers(job: Job) -> dict[str, str]:
    """The names that a model ties to others: at these PEFT wraps the rows as well. Blt ties its embedding to its head, and PEFT's
    head has no rows then."""
    assert job.names.model is not None
    return job.names.model.model.all_tied_weights_keys


def _is_input(job: Job, name: str) -> bool:
    """Whether a parameter is the input embedding's: trained rows there are the head's too, those of the head its own."""
    assert job.names.model is not None
    model: Any = job.names.model.model
    return model.get_submodule(name.rpartition(".")[0]) is model.get_input_embeddings()


def _saved(job: Job, name: str) -> bool:
    """Whether the new value is a module of its own in the trained model (modules_to_save), no longer the shared one."""
    change = job.changes[name]
    return change.value is not None and job.adapters[change.number - 1].saves(name)


def _alike(job: Job, names: Iterable[str], sides: Sides) -> bool:
    """Whether the names are changed in the same way, by values and not by what a config says of them."""
    first, *others = (sides[name] for name in names)
    return all(_equal_changes(job, first, other) for other in others)


def _equal_changes(job: Job, one: Change, other: Change) -> bool:
    if [indices for _, indices in one.rows] != [indices for _, indices in other.rows]:
        return False
    if len(one.parts) != len(other.parts) or (one.value is None) != (other.value is None):
        return False
    pairs = [
        (one.value, other.value),
        *((a, b) for (a, _), (b, _) in zip(one.rows, other.rows, strict=True)),
    ]
    if not all(job.equal_bytes(a, b) for a, b in pairs):
        return False
    return all(_equal_parts(job, a, b) for a, b in zip(one.parts, other.parts, strict=True))


def _equal_parts(job: Job, one: Part, other: Part) -> bool:
    """Whether two additions are the same: equal scales and, element by element, factors; an embedding's lie transposed."""
    if one is other:
        return True
    if (one.adapter.number, one.scale, one.product is None) != (
        other.adapter.number,
        other.scale,
        other.product is None,
    ):
        return False
    if one.magnitude or other.magnitude or one.product is None or other.product is None:
        sides = [(p.magnitude, p.vector, p.lora.a, p.lora.b) for p in (one, other)]
        return one.outputs == other.outputs and all(
            job.equal_bytes(a, b) for a, b in zip(*sides, strict=True)
        )
    first, second = one.product, other.product
    if first.flip == second.flip:
        return job.equal_bytes(first.a, second.a) and job.equal_bytes(first.b, second.b)
    return _transposes(job, first.a, second.b) and _transposes(job, first.b, second.a)


def _transposes(job: Job, one: TensorSpec, other: TensorSpec) -> bool:
    if one.dtype != other.dtype or len(one.shape) != 2 or one.shape != other.shape[::-1]:
        return False
    width = f"u{one.nbytes // math.prod(one.shape)}"
    a, b = (np.frombuffer(job.bytes_of(spec), width).reshape(spec.shape) for spec in (one, other))
    return bool(np.array_equal(a, b.T))


def _set_all(job: Job, group: tuple[str, ...], change: Change) -> None:
    """One change of the shared weight: under every name that the base stores (some store the tied head too)."""
    for name in group:
        job.changes.pop(name, None)
        parameter = job.names.parameter(name)
        if parameter is not None and not parameter.is_alias:
            job.changes[name] = replace(
                change, parameter=replace(parameter, shape=change.parameter.shape)
            )


def _foldable(job: Job, names: list[str]) -> bool:
    """Whether one weight can take all the changes. New values of modules_to_save cannot be folded: PEFT has two weights then."""
    changes = [job.changes[name] for name in names]
    valued = [change for change in changes if change.value is not None]
    rows = [index for change in changes for _, indices in change.rows for index in indices]
    equal = all(job.equal_bytes(valued[0].value, change.value) for change in valued)
    return not any(_saved(job, name) for name in names) and equal and len(set(rows)) == len(rows)


def _sum(job: Job, changed: list[str]) -> Change:
    """Everything that is done to one of the names, done to one weight."""
    changes = [job.changes[name] for name in changed]
    valued = next((change for change in changes if change.value is not None), changes[0])
    return replace(
        valued,
        parts=[part for change in changes for part in change.parts],
        rows=[row for change in changes for row in change.rows],
        adapters=list(dict.fromkeys(name for change in changes for name in change.adapters)),
    )


def _untie(job: Job, apart: dict[tuple[str, ...], Sides]) -> None:
    """Set the config's switch, and write out every parameter that this releases, those that no adapter changes too.

    Which ones are released is asked of the model itself, built with the changed config.
    """
    assert job.names.model is not None
    for config in _switched(job.config):
        model = job.names.model.with_config(config)
        ties = tied_names(model)
        if all(
            _alike(job, part, sides)
            for group, sides in apart.items()
            for part in _parts(group, ties)
        ):
            break
    else:
        job.errors += [_bound(group, "this model's code ties them") for group in apart]
        return
    if _means_more(job.names.model.model, model):
        job.errors += [
            _bound(group, "this model's code does more by tie_word_embeddings than tie")
            for group in apart
        ]
        return
    for group in _groups(job):
        shared = job.changes.get(group[0])
        for part in _parts(group, ties):
            change = apart[group][part[0]] if group in apart else shared
            names = [name for name in part if _is_stored(job, name)] or [part[0]]
            for name in names:
                _set_one(job, name, change)
    job.config = config
    released = [name for group in _groups(job) if len(_parts(group, ties)) > 1 for name in group]
    job.notes.append(f"untied: {', '.join(sorted(released))}; tie_word_embeddings is now false")


def _set_one(job: Job, name: str, change: Change | None) -> None:
    """A change under one name, which becomes a tensor of its own if the base does not store it."""
    parameter = job.names.parameter(name)
    assert parameter is not None and job.names.model is not None
    job.changes.pop(name, None)
    changed = change is not None and (change.value is not None or change.parts or change.rows)
    own = replace(parameter, shape=change.parameter.shape if change else parameter.shape, tied=())
    if parameter.is_alias:
        job.new[name] = replace(change, parameter=own) if change else Change(own)
        if job.names.model.renamed(name) != name:
            read = shown(job.names.model.renamed(name))
            found, hint = (
                f"{shown(name)} cannot be stored: transformers reads that key as {read}",
                "leave it out with --exclude",
            )
            job.errors.append(
                Refused(found, expected="a key of its own", where=job.base.name, hint=hint)
            )
    elif changed:
        assert change is not None
        job.changes[name] = replace(change, parameter=own)


def _parts(group: tuple[str, ...], ties: dict[str, tuple[str, ...]]) -> list[tuple[str, ...]]:
    """The names of a group, by what is still one parameter under these ties; the one that a file holds first in each."""
    parts: dict[frozenset[str], list[str]] = {}
    for name in group:
        parts.setdefault(frozenset((name, *ties.get(name, ()))), []).append(name)
    return [tuple(part) for part in parts.values()]


def _bound(group: tuple[str, ...], why: str) -> Refused:
    return Refused(
        f"{shown(', '.join(sorted(group)))} cannot be untied: {why}",
        expected="a change that the shared weight can take",
        where="adapters",
        hint="leave it out with --exclude, or give --tied fold to change all sides",
    )


def _switched(config: dict) -> Iterator[dict]:
    """The config with the switch off: where it says something of it, then in every sub-config too."""
    for everywhere in (False, True):
        changed = deepcopy(config)
        changed["tie_word_embeddings"] = False
        for part in [p for p in _sub_configs(changed) if everywhere or "tie_word_embeddings" in p]:
            part["tie_word_embeddings"] = False
        yield changed


def _sub_configs(config: dict) -> list[dict]:
    found = [v for v in config.values() if isinstance(v, dict) and "model_type" in v]
    return found + [inner for part in found for inner in _sub_configs(part)]


def _means_more(tied: Any, untied: Any) -> bool:
    """Whether the switch does more to a model than to untie it: to its config, to its parameters, or in its forward (T5 and its kin
    scale the decoder's outputs by it, which only the code says)."""
    if _unswitched(tied.config.to_dict()) != _unswitched(untied.config.to_dict()):
        return True
    if [(k, v.shape) for k, v in tied.state_dict().items()] != [
        (k, v.shape) for k, v in untied.state_dict().items()
    ]:
        return True
    classes = {
        cls
        for module in untied.modules()
        for cls in type(module).__mro__
        if cls.__module__.startswith("transformers.")
    }
    return any(
        "tie_word_embeddings" in inspect.getsource(vars(cls)["forward"])
        for cls in classes
        if "forward" in vars(cls)
    )


def _unswitched(config: Any) -> Any:
    """A config without the switch, and without where it was read."""
    if not isinstance(config, dict):
        return config
    return {
        k: _unswitched(v)
        for k, v in config.items()
        if k not in ("tie_word_embeddings", "_name_or_path")
    }


def set_everywhere(config: dict, key: str, value: Any, *, old: Any = None) -> None:
    """Set a key in the config and its sub-configs where it is already there (with the value `old`, if that is given)."""
    if key in config and old in (None, config[key]):
        config[key] = value
    for sub in config.values():
        if isinstance(sub, dict):
            set_everywhere(sub, key, value, old=old)

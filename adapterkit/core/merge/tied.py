"""Resolve tied embeddings: parameters with several names are kept tied, untied or folded."""

import math
import re
from collections.abc import Iterable, Iterator
from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np

from adapterkit.core.adapter.factors import Factors
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.errors import shown
from adapterkit.core.inputs.model_config import (
    SWITCH,
    has_other_effects,
    nested_values,
    set_nested,
    sub_configs,
    vocabulary_sizes,
)
from adapterkit.core.merge.job import Change, MergeState
from adapterkit.core.plan import HANDOFF_FOLDER
from adapterkit.core.weights.parameters import Parameter


def resolve_vocab_resize(state: MergeState) -> None:
    """Set the config's vocab_size to that of a resized embedding; refuse another size of a stored
    embedding or head."""
    resized: dict[int, str] = {}
    old = 0
    for name, change in {**state.changes, **state.new}.items():
        before = state.names.parameter(name)
        if change.value is not None and before is not None and before.shape != change.value.shape:
            resized[change.value.shape[0]] = name
            old = before.shape[0]
    if not resized:
        return
    if len(resized) > 1:
        sizes = ", ".join(f"{size} ({shown(name)})" for size, name in resized.items())
        state.errors.add(
            f"vocabularies of {sizes} rows",
            "one size",
            "save the adapter with both embeddings (save_embedding_layers=True)",
            code="AK403",
        )
        return
    size, name = next(iter(resized.items()))
    others = [
        parameter.name
        for parameter in _embedding_and_head(state)
        if parameter.shape[:1] == (old,) and not _is_replaced(state, parameter)
    ]
    if others:
        state.errors.add(
            f"{shown(name)} has {size} rows, {shown(others[0])} stays at {old}",
            "embedding and head of one size",
            "save the adapter with both (save_embedding_layers=True)",
            code="AK403",
        )
    set_nested(state.config, "vocab_size", size, old=old)
    state.notes.append(f"vocab_size: {old} -> {size}")


def _embedding_and_head(state: MergeState) -> list[Parameter]:
    """Parameters of the model's input embedding and of its head."""
    model = state.names.model
    if model is None:
        return []
    ends = [model.model.get_input_embeddings(), model.model.get_output_embeddings()]
    modules = [
        name for name, module in model.model.named_modules() if any(module is end for end in ends)
    ]
    names = (f"{module}.{leaf}" for module in modules for leaf in ("weight", "bias"))
    return [parameter for name in names if (parameter := state.names.parameter(name)) is not None]


def _is_replaced(state: MergeState, parameter: Parameter) -> bool:
    """Return whether an adapter has a new value for the parameter, or for one that it stays tied
    to."""
    own = state.changes.get(parameter.name) or state.new.get(parameter.name)
    tied = [state.changes[name] for name in parameter.tied if name in state.changes]
    return any(change.value is not None for change in ([own] if own else tied))


def resolve_new_head(state: MergeState) -> None:
    """Give the config the class and labels of a head that the base lacks; refuse a class whose
    other parameters have no values."""
    heads = [name for name, change in state.new.items() if not change.parameter.slots]
    model = state.names.model
    if not heads or model is None:
        return
    class_name = type(model.model).__name__
    _check_complete(state, class_name, heads)
    if class_name not in (state.config.get("architectures") or []):
        state.notes.append(f"architectures: {state.config.get('architectures')} -> {class_name}")
        state.config["architectures"] = [class_name]
    if "Classification" in class_name:
        last = next((n for n in reversed(heads) if len(state.new[n].parameter.shape) == 2), None)
        if last is not None:
            count = state.new[last].parameter.shape[0]
            state.config.pop("num_labels", None)
            if len(state.config.get("id2label") or {}) != count:
                state.config["id2label"] = {str(i): f"LABEL_{i}" for i in range(count)}
                state.config["label2id"] = {f"LABEL_{i}": i for i in range(count)}


def _check_complete(state: MergeState, class_name: str, heads: list[str]) -> None:
    """Refuse a class with parameters without values: transformers would initialize them at random
    on every load."""
    model = state.names.model
    assert model is not None
    optional = getattr(model.model, "_keys_to_ignore_on_load_missing", None) or ()
    known = model.parameters.keys() | model.unreadable.keys() | state.new.keys()
    missing = [
        name
        for name in model.state
        if not known & {name, *model.tied.get(name, ())}
        and not any(re.search(pattern, name) for pattern in optional)
    ]
    if not missing:
        return
    from adapterkit.core.adapter.selection import ends_of, text_of_entries

    adapter = state.adapter(state.new[heads[0]].value_from)
    names = ", ".join(map(shown, missing[:8])) + ", ..." * (len(missing) > 8)
    state.errors.add(
        f"{class_name} needs {names}, which neither base nor adapter has",
        "values for all parameters: transformers would set these at random on every load",
        "use the base of the training, saved with these, or train them too (modules_to_save); "
        f'--exclude "{text_of_entries(ends_of(adapter, heads))}" leaves the head out',
        where=f"{state.base.name}, {adapter.name}",
        code="AK403",
    )


Sides = dict[str, Change]  # the effective change under each name of one tied parameter


def resolve_tied_weights(state: MergeState) -> None:
    """Untie parameters whose names are changed differently; or refuse them or fold all changes into
    the shared weight, as the option `tied` says."""
    if state.names.model is None:
        if True in nested_values(state.base.config, SWITCH) and state.options.tied != "fold":
            _check_unknown_ties(state)
        return
    unequal: dict[tuple[str, ...], Sides] = {}
    for group in _groups(state):
        changed = [name for name in group if name in state.changes]
        if not changed:
            continue
        sides = _sides(state, group)
        if _are_equal(state, group, sides):
            _set_all(state, group, sides[group[0]])
        elif state.options.tied == "refuse":
            others = ", ".join(name for name in group if name != changed[0])
            state.errors.add(
                f"{shown(changed[0])} is tied to {shown(others)}",
                "a change of both or of neither (--tied refuse)",
                "give --tied untie to make them two, or --tied fold for PEFT's in-memory result",
                code="AK403",
            )
        elif state.options.tied == "fold" and _foldable(state, changed):
            _set_all(state, group, _sum(state, changed))
        else:
            unequal[group] = sides
    if unequal:
        _untie(state, unequal)
    _note_biases(state)


def _check_unknown_ties(state: MergeState) -> None:
    """Refuse a changed embedding if the config says that weights are tied and the model is
    unknown."""
    sizes = vocabulary_sizes(state.base.config)
    names = [
        name
        for name, change in state.changes.items()
        if sizes.intersection(change.parameter.shape[:1])
    ]
    if names:
        state.errors.add(
            f"{', '.join(map(shown, names))} may have other names: the config says "
            "tie_word_embeddings, and transformers cannot build the model",
            "a model that transformers knows",
            "update transformers, or give --tied fold to change what is tied to it as well",
            where=state.base.name,
            code="AK403",
        )


def _note_biases(state: MergeState) -> None:
    """Note heads with a bias and trained token rows: PEFT 0.21 computes them without the bias
    before a merge, and with it after."""
    for name, change in {**state.changes, **state.new}.items():
        heads = [
            n
            for n in (name, *change.parameter.tied)
            if change.rows and state.names.layer(n.rpartition(".")[0]) == "Linear"
        ]
        for head in heads:
            if state.names.parameter(f"{head.rpartition('.')[0]}.bias") is not None:
                state.notes.append(
                    f"{shown(head)} has trained rows and a bias: PEFT ignores the bias until it "
                    "merges, here it counts"
                )


def _groups(state: MergeState) -> list[tuple[str, ...]]:
    """The names of each parameter that has several, the stored one first."""
    assert state.names.model is not None
    groups = {
        frozenset((name, *parameter.tied))
        for name, parameter in state.names.model.parameters.items()
        if parameter.tied
    }
    return sorted(
        tuple(sorted(group, key=lambda name: (not _is_stored(state, name), name)))
        for group in groups
    )


def _is_stored(state: MergeState, name: str) -> bool:
    parameter = state.names.parameter(name)
    return parameter is not None and not parameter.is_alias


def _sides(state: MergeState, group: tuple[str, ...]) -> Sides:
    """The effective change under each name of a parameter, as in PEFT.

    An adapter's token rows at the input embedding act under all names, unless it trained rows under
    another name too. The same is true for values that are no module of their own (a resized
    embedding), under names without a value."""
    own = {name: state.changes[name] for name in group if name in state.changes}
    rows_of: dict[int, list[str]] = {}  # adapter -> the names at which it trained rows
    for name, change in own.items():
        for values, _ in change.rows:
            rows_of.setdefault(values.folder, []).append(name)
    sides: Sides = {}
    for name in group:
        parameter = state.names.parameter(name)
        assert parameter is not None
        change = own.get(name) or Change(parameter)
        side = sides[name] = replace(change, rows=[*change.rows], adapters=[*change.adapters])
        for source, change in own.items():
            follows = source != name and _is_input(state, source) and name in _followers(state)
            rows = [row for row in change.rows if follows and rows_of[row[0].folder] == [source]]
            shared = (
                side.value is None and change.value is not None and not _is_saved(state, source)
            )
            if shared:
                side.value, side.value_from = change.value, change.value_from
                side.parameter = replace(side.parameter, shape=change.parameter.shape)
            side.rows += rows
            if rows or shared:
                side.adapters += [
                    adapter for adapter in change.adapters if adapter not in side.adapters
                ]
    return sides


def _followers(state: MergeState) -> dict[str, str]:
    """The names that a model ties to others, where PEFT's row wrapper takes effect. PEFT wraps the
    rows there as well, which does nothing if the code around a head reads its weight itself. Blt
    ties its embedding to its head, and PEFT's head has no rows then."""
    from adapterkit.core.weights.layers import weight_reader

    assert state.names.model is not None
    tied = state.names.model.model.all_tied_weights_keys
    return {
        name: other
        for name, other in tied.items()
        if weight_reader(state.names, name.rpartition(".")[0]) is None
    }


def _is_input(state: MergeState, name: str) -> bool:
    """Return whether a parameter is the input embedding's. Rows trained there also apply to the
    head; rows trained at the head apply to the head only."""
    assert state.names.model is not None
    model: Any = state.names.model.model
    return model.get_submodule(name.rpartition(".")[0]) is model.get_input_embeddings()


def _is_saved(state: MergeState, name: str) -> bool:
    """Return whether the new value is a separate module in the trained model (modules_to_save), no
    longer the shared one."""
    change = state.changes[name]
    return change.value is not None and state.adapter(change.value_from).saves(name)


def _are_equal(state: MergeState, names: Iterable[str], sides: Sides) -> bool:
    """Compare the changes of the names by their values, whatever the config says."""
    first, *others = (sides[name] for name in names)
    return all(_equal_changes(state, first, other) for other in others)


def _equal_changes(state: MergeState, one: Change, other: Change) -> bool:
    if [indices for _, indices in one.rows] != [indices for _, indices in other.rows]:
        return False
    if state.methods and one.weights != other.weights:
        return False
    if one.deltas != other.deltas:
        return False
    if len(one.additions) != len(other.additions) or (one.value is None) != (other.value is None):
        return False
    vectors = [[(spec.folder, scale) for spec, scale in each.vectors] for each in (one, other)]
    if vectors[0] != vectors[1]:
        return False
    pairs = [
        (one.value, other.value),
        *((a, b) for (a, _), (b, _) in zip(one.rows, other.rows, strict=True)),
        *((a, b) for (a, _), (b, _) in zip(one.vectors, other.vectors, strict=True)),
    ]
    if not all(state.same_bytes(a, b) for a, b in pairs):
        return False
    additions = zip(one.additions, other.additions, strict=True)
    return all(_equal_additions(state, a, b) for a, b in additions)


def _equal_additions(state: MergeState, one: Factors, other: Factors) -> bool:
    """Return whether two additions are the same: scales, weights of directions and all elements of
    the factors are equal. An embedding's factors are stored transposed."""
    if one is other:
        return True
    if HANDOFF_FOLDER in (one.a.folder, other.a.folder):
        return False  # factors of the same plan: there are no bytes yet
    sides = ((each.a.folder, each.scale, each.directions) for each in (one, other))
    if len({*sides}) > 1:
        return False
    if one.flip == other.flip:
        sides = ((each.magnitude, each.a, each.b) for each in (one, other))
        return all(state.same_bytes(a, b) for a, b in zip(*sides, strict=True))
    is_plain = one.magnitude is None and other.magnitude is None
    return (
        is_plain
        and _are_transposes(state, one.a, other.b)
        and _are_transposes(state, one.b, other.a)
    )


def _are_transposes(state: MergeState, one: TensorSpec, other: TensorSpec) -> bool:
    """Return whether two matrices of adapters are each other's transpose, bit for bit."""
    if one.dtype != other.dtype or len(one.shape) != 2 or one.shape != other.shape[::-1]:
        return False
    width = f"u{one.nbytes // math.prod(one.shape)}"
    matrices = []
    for folder, spec in map(state.in_folder, (one, other)):
        data = folder.read(spec.file, spec.start, spec.stop)
        matrices.append(np.frombuffer(data, width).reshape(spec.shape))
    return bool(np.array_equal(matrices[0], matrices[1].T))


def _set_all(state: MergeState, group: tuple[str, ...], change: Change) -> None:
    """Change the shared weight under every name that the base stores (some store the tied head
    too)."""
    for name in group:
        state.changes.pop(name, None)
        parameter = state.names.parameter(name)
        if parameter is not None and not parameter.is_alias:
            state.changes[name] = replace(
                change, parameter=replace(parameter, shape=change.parameter.shape)
            )


def _foldable(state: MergeState, names: list[str]) -> bool:
    """Return whether one weight can take all the changes. New values of modules_to_save cannot be
    folded, because PEFT has two weights then."""
    changes = [state.changes[name] for name in names]
    valued = [change for change in changes if change.value is not None]
    rows = [index for change in changes for _, indices in change.rows for index in indices]
    if any(_is_saved(state, name) for name in names) or len(set(rows)) != len(rows):
        return False
    weights = {pair for change in changes for pair in change.weights.items()}
    if state.methods and len(weights) > len(dict(weights)):
        return False  # one adapter has several weights
    return all(state.same_bytes(valued[0].value, change.value) for change in valued)


def _sum(state: MergeState, changed: list[str]) -> Change:
    """The changes of all names as one change."""
    changes = [state.changes[name] for name in changed]
    valued = next((change for change in changes if change.value is not None), changes[0])
    return replace(
        valued,
        additions=[factors for change in changes for factors in change.additions],
        weights={n: weight for change in changes for n, weight in change.weights.items()},
        deltas=[one for change in changes for one in change.deltas],
        vectors=[vector for change in changes for vector in change.vectors],
        rows=[row for change in changes for row in change.rows],
        adapters=list(dict.fromkeys(name for change in changes for name in change.adapters)),
    )


def _untie(state: MergeState, unequal: dict[tuple[str, ...], Sides]) -> None:
    """Turn the config's switch off, and write every parameter that this releases, including
    parameters that no adapter changes.

    To find them, the model is built with the changed config."""
    assert state.names.model is not None
    for config in _untied_configs(state.config):
        model, ties = state.names.model.with_config(config)
        if all(
            _are_equal(state, names, sides)
            for group, sides in unequal.items()
            for names in _split(group, ties)
        ):
            break
    else:
        _refuse_untying(state, unequal, "this model's code ties them")
        return
    if has_other_effects(state.names.model.model, model):
        _refuse_untying(
            state, unequal, "this model's code does more by tie_word_embeddings than tie"
        )
        return
    for group in _groups(state):
        shared = state.changes.get(group[0])
        for names in _split(group, ties):
            change = unequal[group][names[0]] if group in unequal else shared
            for name in [name for name in names if _is_stored(state, name)] or [names[0]]:
                _set_one(state, name, change)
    state.config = config
    released = [name for group in _groups(state) if len(_split(group, ties)) > 1 for name in group]
    state.notes.append(f"untied: {', '.join(sorted(released))}; tie_word_embeddings is now false")


def _refuse_untying(state: MergeState, groups: Iterable[tuple[str, ...]], reason: str) -> None:
    for group in groups:
        state.errors.add(
            f"{shown(', '.join(sorted(group)))} cannot be untied: {reason}",
            "a change that the shared weight can take",
            "exclude it with --exclude, or give --tied fold to change all sides",
            code="AK403",
        )


def _set_one(state: MergeState, name: str, change: Change | None) -> None:
    """Change one name only; it becomes a separate tensor if the base does not store it."""
    parameter = state.names.parameter(name)
    assert parameter is not None and state.names.model is not None
    state.changes.pop(name, None)
    own = replace(parameter, shape=change.parameter.shape if change else parameter.shape, tied=())
    if parameter.is_alias:
        state.new[name] = replace(change, parameter=own) if change else Change(own)
        key = state.names.model.renamed(name)
        if key != name:
            state.errors.add(
                f"{shown(name)} cannot be stored: transformers reads that key as {shown(key)}",
                "a key of its own",
                "exclude it with --exclude",
                where=state.base.name,
                code="AK403",
            )
    elif change is not None and (change.value is not None or change.has_edits):
        state.changes[name] = replace(change, parameter=own)


def _split(group: tuple[str, ...], ties: dict[str, tuple[str, ...]]) -> list[tuple[str, ...]]:
    """The names of a group by parameter under these ties, each with the name that a file stores
    first."""
    parameters: dict[frozenset[str], list[str]] = {}
    for name in group:
        parameters.setdefault(frozenset((name, *ties.get(name, ()))), []).append(name)
    return [tuple(names) for names in parameters.values()]


def _untied_configs(config: dict) -> Iterator[dict]:
    """Yield the config with the switch off wherever it is set, then also off in every
    sub-config."""
    for everywhere in (False, True):
        changed = deepcopy(config)
        changed[SWITCH] = False
        for sub_config in sub_configs(changed):
            if everywhere or SWITCH in sub_config:
                sub_config[SWITCH] = False
        yield changed

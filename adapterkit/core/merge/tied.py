"""Tied embeddings: parameters with several names, kept tied, untied or folded."""

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
from adapterkit.core.merge.job import Change, MergeJob
from adapterkit.core.plan import HANDOFF_FOLDER
from adapterkit.core.weights.parameters import Parameter
from adapterkit.core.weights.skeleton import tied_names
from adapterkit.core.weights.unsupported_layers import weight_reader


def resolve_vocab_resize(job: MergeJob) -> None:
    """Set the config's vocab_size to that of a resized embedding; refuse another size of a stored
    embedding or head."""
    resized: dict[int, str] = {}
    old = 0
    for name, change in {**job.changes, **job.new}.items():
        before = job.names.parameter(name)
        if change.value is not None and before is not None and before.shape != change.value.shape:
            resized[change.value.shape[0]] = name
            old = before.shape[0]
    if not resized:
        return
    if len(resized) > 1:
        sizes = ", ".join(f"{size} ({shown(name)})" for size, name in resized.items())
        job.errors.add(
            f"vocabularies of {sizes} rows",
            "one size",
            "save the adapter with both embeddings (save_embedding_layers=True)",
            code="AK403",
        )
        return
    size, name = next(iter(resized.items()))
    others = [
        parameter.name
        for parameter in _embedding_and_head(job)
        if parameter.shape[:1] == (old,) and not _is_replaced(job, parameter)
    ]
    if others:
        job.errors.add(
            f"{shown(name)} has {size} rows, {shown(others[0])} stays at {old}",
            "embedding and head of one size",
            "save the adapter with both (save_embedding_layers=True)",
            code="AK403",
        )
    set_nested(job.config, "vocab_size", size, old=old)
    job.notes.append(f"vocab_size: {old} -> {size}")


def _embedding_and_head(job: MergeJob) -> list[Parameter]:
    """Parameters of the model's input embedding and of its head."""
    model = job.names.model
    if model is None:
        return []
    ends = [model.model.get_input_embeddings(), model.model.get_output_embeddings()]
    modules = [
        name for name, module in model.model.named_modules() if any(module is end for end in ends)
    ]
    names = (f"{module}.{leaf}" for module in modules for leaf in ("weight", "bias"))
    return [parameter for name in names if (parameter := job.names.parameter(name)) is not None]


def _is_replaced(job: MergeJob, parameter: Parameter) -> bool:
    """Whether an adapter has a new value for the parameter, or for one to which it stays tied."""
    own = job.changes.get(parameter.name) or job.new.get(parameter.name)
    tied = [job.changes[name] for name in parameter.tied if name in job.changes]
    return any(change.value is not None for change in ([own] if own else tied))


def resolve_new_head(job: MergeJob) -> None:
    """Give the config the class and labels of a head that the base lacks; refuse a class of which
    other parameters have no values."""
    heads = [name for name, change in job.new.items() if not change.parameter.slots]
    model = job.names.model
    if not heads or model is None:
        return
    class_name = type(model.model).__name__
    _check_complete(job, class_name, heads)
    if class_name not in (job.config.get("architectures") or []):
        job.notes.append(f"architectures: {job.config.get('architectures')} -> {class_name}")
        job.config["architectures"] = [class_name]
    if "Classification" in class_name:
        last = next((n for n in reversed(heads) if len(job.new[n].parameter.shape) == 2), None)
        if last is not None:
            count = job.new[last].parameter.shape[0]
            job.config.pop("num_labels", None)
            if len(job.config.get("id2label") or {}) != count:
                job.config["id2label"] = {str(i): f"LABEL_{i}" for i in range(count)}
                job.config["label2id"] = {f"LABEL_{i}": i for i in range(count)}


def _check_complete(job: MergeJob, class_name: str, heads: list[str]) -> None:
    """Refuse a class with parameters without a value: transformers would draw them on every
    load."""
    model = job.names.model
    assert model is not None
    optional = getattr(model.model, "_keys_to_ignore_on_load_missing", None) or ()
    known = model.parameters.keys() | model.unreadable.keys() | job.new.keys()
    ties = tied_names(model.model)
    missing = [
        name
        for name in model.state
        if not known & {name, *ties.get(name, ())}
        and not any(re.search(pattern, name) for pattern in optional)
    ]
    if not missing:
        return
    adapter = job.adapter(job.new[heads[0]].value_from)
    names = ", ".join(map(shown, missing[:8])) + ", ..." * (len(missing) > 8)
    job.errors.add(
        f"{class_name} needs {names}, which neither base nor adapter has",
        "values for all parameters: transformers would make these up at random on every load",
        "use the base of the training, saved with these, or train them too (modules_to_save); "
        f'--exclude "{adapter.pattern_of(heads)}" leaves the head out',
        where=f"{job.base.name}, {adapter.name}",
        code="AK403",
    )


Sides = dict[str, Change]  # the effective change under each name of one tied parameter


def resolve_tied_weights(job: MergeJob) -> None:
    """Untie parameters whose names are not changed in the same way, or as the option `tied` has it:
    refuse them, or fold all changes into the shared weight."""
    if job.names.model is None:
        _check_unknown_ties(job)
    unequal: dict[tuple[str, ...], Sides] = {}
    for group in _groups(job):
        changed = [name for name in group if name in job.changes]
        if not changed:
            continue
        sides = _sides(job, group)
        if _are_equal(job, group, sides):
            _set_all(job, group, sides[group[0]])
        elif job.options.tied == "refuse":
            others = ", ".join(name for name in group if name != changed[0])
            job.errors.add(
                f"{shown(changed[0])} is tied to {shown(others)}",
                "a change of both or of neither (--tied refuse)",
                "give --tied untie to make them two, or --tied fold for PEFT's in-memory result",
                code="AK403",
            )
        elif job.options.tied == "fold" and _foldable(job, changed):
            _set_all(job, group, _sum(job, changed))
        else:
            unequal[group] = sides
    if unequal:
        _untie(job, unequal)
    _note_biases(job)


def _check_unknown_ties(job: MergeJob) -> None:
    """Without the model nobody knows what is tied to an embedding: refuse to change one where the
    config says that something is."""
    sizes = vocabulary_sizes(job.base.config)
    names = [
        name
        for name, change in job.changes.items()
        if sizes.intersection(change.parameter.shape[:1])
    ]
    tied = True in nested_values(job.base.config, SWITCH)
    if names and tied and job.options.tied != "fold":
        job.errors.add(
            f"{', '.join(map(shown, names))} may have other names: the config says "
            "tie_word_embeddings, and transformers cannot build the model",
            "a model that transformers knows",
            "update transformers, or give --tied fold to change what is tied to it as well",
            where=job.base.name,
            code="AK403",
        )


def _note_biases(job: MergeJob) -> None:
    """Note heads with a bias and trained token rows: PEFT 0.21 computes these without the bias
    before a merge, and with it afterwards."""
    for name, change in {**job.changes, **job.new}.items():
        heads = [
            n
            for n in (name, *change.parameter.tied)
            if change.rows and job.names.layer(n.rpartition(".")[0]) == "Linear"
        ]
        for head in heads:
            if job.names.parameter(f"{head.rpartition('.')[0]}.bias") is not None:
                job.notes.append(
                    f"{shown(head)} has trained rows and a bias: PEFT ignores the bias until it "
                    "merges, here it counts"
                )


def _groups(job: MergeJob) -> list[tuple[str, ...]]:
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


def _is_stored(job: MergeJob, name: str) -> bool:
    parameter = job.names.parameter(name)
    return parameter is not None and not parameter.is_alias


def _sides(job: MergeJob, group: tuple[str, ...]) -> Sides:
    """The effective change under each name of a parameter, as in PEFT.

    An adapter's token rows at the input embedding act under all names, unless it trained rows under
    another name too; so do values that are no module of their own (a resized embedding), where a
    name has none.
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
        change = own.get(name) or Change(parameter)
        side = sides[name] = replace(change, rows=[*change.rows], adapters=[*change.adapters])
        for source, change in own.items():
            follows = source != name and _is_input(job, source) and name in _followers(job)
            rows = [row for row in change.rows if follows and rows_of[row[0].folder] == [source]]
            shared = side.value is None and change.value is not None and not _is_saved(job, source)
            if shared:
                side.value, side.value_from = change.value, change.value_from
                side.parameter = replace(side.parameter, shape=change.parameter.shape)
            side.rows += rows
            if rows or shared:
                side.adapters += [
                    adapter for adapter in change.adapters if adapter not in side.adapters
                ]
    return sides


def _followers(job: MergeJob) -> dict[str, str]:
    """The names that a model ties to others: PEFT wraps the rows there as well, which does nothing
    where the code around a head reads its weight itself. Blt ties its embedding to its head, and
    PEFT's head has no rows then."""
    assert job.names.model is not None
    tied = job.names.model.model.all_tied_weights_keys
    return {
        name: other
        for name, other in tied.items()
        if weight_reader(job.names, name.rpartition(".")[0]) is None
    }


def _is_input(job: MergeJob, name: str) -> bool:
    """Whether a parameter is the input embedding's: trained rows there are the head's too, those of
    the head its own."""
    assert job.names.model is not None
    model: Any = job.names.model.model
    return model.get_submodule(name.rpartition(".")[0]) is model.get_input_embeddings()


def _is_saved(job: MergeJob, name: str) -> bool:
    """Whether the new value is a module of its own in the trained model (modules_to_save), no
    longer the shared one."""
    change = job.changes[name]
    return change.value is not None and job.adapter(change.value_from).saves(name)


def _are_equal(job: MergeJob, names: Iterable[str], sides: Sides) -> bool:
    """Whether the names are changed in the same way, by the values, whatever a config says of
    them."""
    first, *others = (sides[name] for name in names)
    return all(_equal_changes(job, first, other) for other in others)


def _equal_changes(job: MergeJob, one: Change, other: Change) -> bool:
    if [indices for _, indices in one.rows] != [indices for _, indices in other.rows]:
        return False
    if job.methods and one.weights != other.weights:
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
    if not all(job.same_bytes(a, b) for a, b in pairs):
        return False
    additions = zip(one.additions, other.additions, strict=True)
    return all(_equal_additions(job, a, b) for a, b in additions)


def _equal_additions(job: MergeJob, one: Factors, other: Factors) -> bool:
    """Whether two additions are the same: equal scales, weights of directions and, element by
    element, factors; those of an embedding are stored transposed."""
    if one is other:
        return True
    if HANDOFF_FOLDER in (one.a.folder, other.a.folder):
        return False  # factors of the same plan: there are no bytes yet
    sides = ((each.a.folder, each.scale, each.directions) for each in (one, other))
    if len({*sides}) > 1:
        return False
    if one.flip == other.flip:
        sides = ((each.magnitude, each.a, each.b) for each in (one, other))
        return all(job.same_bytes(a, b) for a, b in zip(*sides, strict=True))
    is_plain = one.magnitude is None and other.magnitude is None
    return (
        is_plain and _are_transposes(job, one.a, other.b) and _are_transposes(job, one.b, other.a)
    )


def _are_transposes(job: MergeJob, one: TensorSpec, other: TensorSpec) -> bool:
    """Whether two matrices of adapters are each other's transpose, bit for bit."""
    if one.dtype != other.dtype or len(one.shape) != 2 or one.shape != other.shape[::-1]:
        return False
    width = f"u{one.nbytes // math.prod(one.shape)}"
    matrices = []
    for folder, spec in map(job.in_folder, (one, other)):
        data = folder.read(spec.file, spec.start, spec.stop)
        matrices.append(np.frombuffer(data, width).reshape(spec.shape))
    return bool(np.array_equal(matrices[0], matrices[1].T))


def _set_all(job: MergeJob, group: tuple[str, ...], change: Change) -> None:
    """Change the shared weight under every name that the base stores (some store the tied head
    too)."""
    for name in group:
        job.changes.pop(name, None)
        parameter = job.names.parameter(name)
        if parameter is not None and not parameter.is_alias:
            job.changes[name] = replace(
                change, parameter=replace(parameter, shape=change.parameter.shape)
            )


def _foldable(job: MergeJob, names: list[str]) -> bool:
    """Whether one weight can take all the changes. New values of modules_to_save cannot be folded:
    PEFT has two weights then."""
    changes = [job.changes[name] for name in names]
    valued = [change for change in changes if change.value is not None]
    rows = [index for change in changes for _, indices in change.rows for index in indices]
    if any(_is_saved(job, name) for name in names) or len(set(rows)) != len(rows):
        return False
    weights = {pair for change in changes for pair in change.weights.items()}
    if job.methods and len(weights) > len(dict(weights)):
        return False  # one adapter has several
    return all(job.same_bytes(valued[0].value, change.value) for change in valued)


def _sum(job: MergeJob, changed: list[str]) -> Change:
    """The changes of all names as one change."""
    changes = [job.changes[name] for name in changed]
    valued = next((change for change in changes if change.value is not None), changes[0])
    return replace(
        valued,
        additions=[factors for change in changes for factors in change.additions],
        weights={n: weight for change in changes for n, weight in change.weights.items()},
        vectors=[vector for change in changes for vector in change.vectors],
        rows=[row for change in changes for row in change.rows],
        adapters=list(dict.fromkeys(name for change in changes for name in change.adapters)),
    )


def _untie(job: MergeJob, unequal: dict[tuple[str, ...], Sides]) -> None:
    """Turn the config's switch off, and write every parameter that this releases, also those that
    no adapter changes.

    Which ones are released is read off the model itself, built with the changed config.
    """
    assert job.names.model is not None
    for config in _untied_configs(job.config):
        model = job.names.model.with_config(config)
        ties = tied_names(model)
        if all(
            _are_equal(job, names, sides)
            for group, sides in unequal.items()
            for names in _split(group, ties)
        ):
            break
    else:
        _refuse_untying(job, unequal, "this model's code ties them")
        return
    if has_other_effects(job.names.model.model, model):
        _refuse_untying(job, unequal, "this model's code does more by tie_word_embeddings than tie")
        return
    for group in _groups(job):
        shared = job.changes.get(group[0])
        for names in _split(group, ties):
            change = unequal[group][names[0]] if group in unequal else shared
            for name in [name for name in names if _is_stored(job, name)] or [names[0]]:
                _set_one(job, name, change)
    job.config = config
    released = [name for group in _groups(job) if len(_split(group, ties)) > 1 for name in group]
    job.notes.append(f"untied: {', '.join(sorted(released))}; tie_word_embeddings is now false")


def _refuse_untying(job: MergeJob, groups: Iterable[tuple[str, ...]], reason: str) -> None:
    for group in groups:
        job.errors.add(
            f"{shown(', '.join(sorted(group)))} cannot be untied: {reason}",
            "a change that the shared weight can take",
            "exclude it with --exclude, or give --tied fold to change all sides",
            code="AK403",
        )


def _set_one(job: MergeJob, name: str, change: Change | None) -> None:
    """Change one name alone; it becomes a tensor of its own if the base does not store it."""
    parameter = job.names.parameter(name)
    assert parameter is not None and job.names.model is not None
    job.changes.pop(name, None)
    own = replace(parameter, shape=change.parameter.shape if change else parameter.shape, tied=())
    if parameter.is_alias:
        job.new[name] = replace(change, parameter=own) if change else Change(own)
        key = job.names.model.renamed(name)
        if key != name:
            job.errors.add(
                f"{shown(name)} cannot be stored: transformers reads that key as {shown(key)}",
                "a key of its own",
                "exclude it with --exclude",
                where=job.base.name,
                code="AK403",
            )
    elif change is not None and (change.value is not None or change.has_edits):
        job.changes[name] = replace(change, parameter=own)


def _split(group: tuple[str, ...], ties: dict[str, tuple[str, ...]]) -> list[tuple[str, ...]]:
    """The names of a group by parameter under these ties; the one that a file stores first in
    each."""
    parameters: dict[frozenset[str], list[str]] = {}
    for name in group:
        parameters.setdefault(frozenset((name, *ties.get(name, ()))), []).append(name)
    return [tuple(names) for names in parameters.values()]


def _untied_configs(config: dict) -> Iterator[dict]:
    """The config with the switch off where it has one, then with it off in every sub-config too."""
    for everywhere in (False, True):
        changed = deepcopy(config)
        changed[SWITCH] = False
        for sub_config in sub_configs(changed):
            if everywhere or SWITCH in sub_config:
                sub_config[SWITCH] = False
        yield changed

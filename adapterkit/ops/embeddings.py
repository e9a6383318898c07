"""Embeddings and heads: parameters that are one in memory, vocabularies of another size, heads that the base lacks."""

from dataclasses import replace
from typing import Any

from adapterkit.errors import Refused, shown
from adapterkit.ops.job import Change, Job
from adapterkit.weights.names import Parameter
from adapterkit.weights.slots import Slot, identity_slot


def settle_ties(job: Job) -> None:
    """Parameters that are one in memory: untie what only one side changes, unless told otherwise."""
    seen: set[str] = set()
    for name in list(job.changes):
        change = job.changes[name]
        if not change.parameter.tied or name in seen:
            continue
        group = [name, *change.parameter.tied]
        seen.update(group)
        stored = next((g for g in group if g in job.base.tensors or _stored_apart(job, g, group)), name)
        changed = [g for g in group if g in job.changes]
        if _same_change(job, group):
            kept = job.changes[changed[0]] if stored not in job.changes else job.changes[stored]
            for other in changed:
                job.changes.pop(other)
            job.changes[stored] = kept
            _replace_copies(job, stored, group, kept)
        elif job.options.tied == "refuse":
            job.errors.append(
                Refused(
                    f"{shown(changed[0])} is tied to {shown(', '.join(g for g in group if g != changed[0]))}",
                    expected="a change of both or of neither (--tied refuse)",
                    where="adapters",
                    do="give --tied untie to make them two, or --tied fold for PEFT's in-memory result",
                )
            )
        elif job.options.tied == "fold":
            _fold(job, stored, group, changed)
        else:
            _untie(job, stored, group)


def _stored_apart(job: Job, name: str, group: list[str]) -> bool:
    parameter = job.names.parameter(name)
    return parameter is not None and any(slot.key not in group for slot in parameter.slots)


def _same_change(job: Job, group: list[str]) -> bool:
    """Whether the adapters mean one change of the shared weight: token rows (PEFT shares them), ensure_weight_tying."""
    changed = [job.changes[g] for g in group if g in job.changes]
    if all(c.rows and not c.parts and c.value is None for c in changed):
        return len(changed) == 1 or all(
            [i for _, i in c.rows] == [i for _, i in changed[0].rows] for c in changed
        )  # fmt: skip
    numbers = {p.adapter.number for c in changed for p in c.parts} | {c.number for c in changed if c.value is not None}
    return all(job.adapters[n - 1].config.get("ensure_weight_tying") for n in numbers)


def _replace_copies(job: Job, stored: str, group: list[str], change: Change) -> None:
    """A tied twin that the base stores as well gets the same change, so that the file stays consistent."""
    for other in group:
        if other != stored and other in job.base.tensors:
            parameter = job.names.parameter(other)
            assert parameter is not None
            twin = Parameter(other, change.parameter.shape, own_slot(other, parameter), ())
            job.changes[other] = replace(change, parameter=twin)


def _fold(job: Job, stored: str, group: list[str], changed: list[str]) -> None:
    target = job.changes.pop(stored, None) or Change(replace(job.changes[changed[0]].parameter, name=stored))
    for other in changed:
        change = job.changes.pop(other, None)
        if change is not None:
            target.value = target.value or change.value
            target.parts += change.parts
            target.rows += change.rows
            target.adapters += change.adapters
    job.changes[stored] = target
    _replace_copies(job, stored, group, target)


def _untie(job: Job, stored: str, group: list[str]) -> None:
    """Every name of the group that is not stored becomes a tensor of its own."""
    parameter = job.names.parameter(stored)
    assert parameter is not None
    for name in group:
        change = job.changes.get(name)
        if name == stored:
            continue
        if name in job.base.tensors:
            if change is not None:
                change.parameter = replace(change.parameter, slots=own_slot(name, change.parameter))
            continue
        change = job.changes.pop(name, None) or Change(replace(parameter, name=name))
        change.parameter = replace(change.parameter, name=name)
        job.new[name] = change
    set_everywhere(job.config, "tie_word_embeddings", False)
    job.config["tie_word_embeddings"] = False
    job.notes.append(f"untied: {', '.join(sorted(group))}; tie_word_embeddings is now false")


def settle_vocabulary(job: Job) -> None:
    """A resized embedding changes vocab_size in the config; every stored embedding and head must agree."""
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
        job.errors.append(
            Refused(
                f"vocabularies of {', '.join(f'{n} ({shown(name)})' for n, name in resized.items())} rows",
                expected="one size",
                where="adapters",
                do="save the adapter with both embeddings (save_embedding_layers=True)",
            )
        )
        return
    size, name = next(iter(resized.items()))
    others = [
        other
        for other in job.base.tensors
        if other not in job.changes and job.base.tensors[other].shape[:1] == (old,) and _is_vocabulary(job, other)
    ]
    if others:
        job.errors.append(
            Refused(
                f"{shown(name)} has {size} rows, {shown(others[0])} stays at {old}",
                expected="embedding and head of one size",
                where="adapters",
                do="save the adapter with both (save_embedding_layers=True)",
            )
        )
    _set_where(job.config, "vocab_size", old, size)
    job.notes.append(f"vocab_size: {old} -> {size}")


def _is_vocabulary(job: Job, key: str) -> bool:
    parameter = job.names.parameter(key)
    if parameter is None or len(parameter.shape) != 2:
        return False
    model = job.names.model
    if model is None:
        return False
    ends = [model.model.get_input_embeddings(), model.model.get_output_embeddings()]
    module = parameter.name.rpartition(".")[0]
    return any(end is not None and model.model.get_submodule(module) is end for end in ends)


def settle_head(job: Job) -> None:
    """A head that the base lacks comes with the config of the class that has it."""
    heads = [name for name, change in job.new.items() if not change.parameter.slots]
    model = job.names.model
    if not heads or model is None:
        return
    class_name = type(model.model).__name__
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


def own_slot(name: str, parameter: Parameter) -> tuple[Slot, ...]:
    """The slot of a parameter that is stored under its own name."""
    return (identity_slot(name, parameter.shape),)


def _set_where(config: dict, key: str, old: Any, new: Any) -> None:
    if config.get(key) == old:
        config[key] = new
    for sub in config.values():
        if isinstance(sub, dict):
            _set_where(sub, key, old, new)


def set_everywhere(config: dict, key: str, value: Any) -> None:
    """Set a key in the config and its sub-configs, where it is already there."""
    if key in config:
        config[key] = value
    for sub in config.values():
        if isinstance(sub, dict):
            set_everywhere(sub, key, value)

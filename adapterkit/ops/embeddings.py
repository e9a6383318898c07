"""Embeddings and heads: parameters that are one in memory, vocabularies of another size, heads that the base lacks."""

import inspect
from dataclasses import replace
from typing import Any

from adapterkit.checkpoint.header import TensorSpec
from adapterkit.errors import Refused, shown
from adapterkit.ops.job import Change, Job
from adapterkit.weights.names import Parameter

BLOCK = 16 << 20  # bytes compared at a time


def settle_ties(job: Job) -> None:
    """Parameters that are one in memory: untie what only one side changes, unless told otherwise."""
    seen: set[str] = set()
    for name in list(job.changes):
        if name in seen or not job.changes[name].parameter.tied:
            continue
        change = job.changes[name]
        group = [name, *change.parameter.tied]
        seen.update(group)
        stored = next(g for g in group if (p := job.names.parameter(g)) and not p.twin)
        changed = [g for g in group if g in job.changes]
        if _same_change(job, changed):
            kept = job.changes[max(changed, key=lambda g: (bool(job.changes[g].rows), g == stored))]
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
        elif job.options.tied == "fold" and _foldable(job, changed):
            _fold(job, stored, group, changed)
        else:
            _untie(job, stored, group)


def _same_change(job: Job, names: list[str]) -> bool:
    """Whether the adapters mean one change of the shared weight: PEFT writes trained token rows and a resized embedding under one
    name, or under several with equal values, and with ensure_weight_tying a delta too."""
    changes = [job.changes[name] for name in names]
    numbers = {p.adapter.number for c in changes for p in c.parts} | {c.number for c in changes if c.value is not None}
    if numbers and all(job.adapters[n - 1].config.get("ensure_weight_tying") for n in numbers):
        return True
    if any(change.parts for change in changes):
        return False
    if len(names) == 1 and _saved(job, names[0]):
        return False
    if not all(_equal_bytes(job, changes[0].value, change.value) for change in changes[1:]):
        return False
    rowed = [name for name in names if job.changes[name].rows]
    return _is_input(job, rowed[0]) if len(rowed) == 1 else all(_equal_rows(job, changes[0], change) for change in changes[1:])


def _is_input(job: Job, name: str) -> bool:
    """Whether a parameter is the input embedding's: trained rows there are the head's too, those of the head its own."""
    assert job.names.model is not None
    model: Any = job.names.model.model
    return model.get_submodule(name.rpartition(".")[0]) is model.get_input_embeddings()


def _saved(job: Job, name: str) -> bool:
    """Whether the new value is a module of its own in the trained model (modules_to_save), no longer the shared one."""
    change = job.changes[name]
    return change.value is not None and job.adapters[change.number - 1].saves(name)


def _equal_rows(job: Job, change: Change, other: Change) -> bool:
    if [indices for _, indices in change.rows] != [indices for _, indices in other.rows]:
        return False
    return all(_equal_bytes(job, a, b) for (a, _), (b, _) in zip(change.rows, other.rows, strict=True))


def _equal_bytes(job: Job, a: TensorSpec | None, b: TensorSpec | None) -> bool:
    """Whether two tensors of adapters are the same, bit for bit."""
    if a is None or b is None:
        return a is b
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    cuts = [(at, min(at + BLOCK, a.nbytes)) for at in range(0, a.nbytes, BLOCK)]
    return all(_bytes(job, a, *cut) == _bytes(job, b, *cut) for cut in cuts)


def _bytes(job: Job, spec: TensorSpec, start: int, stop: int) -> bytes:
    return job.adapters[spec.folder - 1].folder.read(spec.file, spec.start + start, spec.start + stop)


def _replace_copies(job: Job, stored: str, group: list[str], change: Change) -> None:
    """A tied twin that the base stores as well gets the same change, so that the file stays consistent."""
    for other in group:
        parameter = job.names.parameter(other)
        if other != stored and parameter is not None and not parameter.twin:
            job.changes[other] = replace(change, parameter=replace(parameter, shape=change.parameter.shape, tied=()))


def _foldable(job: Job, names: list[str]) -> bool:
    """Whether one weight can take all the changes. New values of modules_to_save cannot be folded: PEFT has two weights then."""
    changes = [job.changes[name] for name in names]
    valued = [change for change in changes if change.value is not None]
    rows = [index for change in changes for _, indices in change.rows for index in indices]
    equal = all(_equal_bytes(job, valued[0].value, change.value) for change in valued)
    return not any(_saved(job, name) for name in names) and equal and len(set(rows)) == len(rows)


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
    source = job.names.parameter(stored)
    assert source is not None
    if _tied_by_code(job):
        job.errors.append(
            Refused(
                f"{shown(', '.join(sorted(group)))} cannot be untied: this model's code ties them, or scales its outputs by "
                "tie_word_embeddings",
                expected="a change that the shared weight can take",
                where="adapters",
                do="leave it out with --exclude, or give --tied fold to change all sides",
            )
        )
        return
    for name in group:
        parameter = job.names.parameter(name)
        if parameter is None or parameter.twin:
            change = job.changes.pop(name, None) or Change(replace(source, name=name))
            change.parameter = replace(change.parameter, name=name)
            job.new[name] = change
    set_everywhere(job.config, "tie_word_embeddings", False)
    job.config["tie_word_embeddings"] = False
    job.notes.append(f"untied: {', '.join(sorted(group))}; tie_word_embeddings is now false")


def _tied_by_code(job: Job) -> bool:
    """Whether tie_word_embeddings = false would not untie, or would do more than that (T5 and its kin)."""
    assert job.names.model is not None
    model: Any = job.names.model.model
    untied = type(model.config)(**(model.config.to_dict() | {"tie_word_embeddings": False}))
    forwards = [vars(cls)["forward"] for cls in type(model).__mro__ if "forward" in vars(cls)]
    return bool(untied.tie_word_embeddings) or "tie_word_embeddings" in inspect.getsource(forwards[0])


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
    staying = [p.name for p in _of_vocabulary(job) if p.shape[:1] == (old,) and not _is_replaced(job, p)]
    if staying:
        job.errors.append(
            Refused(
                f"{shown(name)} has {size} rows, {shown(staying[0])} stays at {old}",
                expected="embedding and head of one size",
                where="adapters",
                do="save the adapter with both (save_embedding_layers=True)",
            )
        )
    set_everywhere(job.config, "vocab_size", size, old=old)
    job.notes.append(f"vocab_size: {old} -> {size}")


def _of_vocabulary(job: Job) -> list[Parameter]:
    """Parameters of the model's input embedding and of its head."""
    model = job.names.model
    if model is None:
        return []
    ends = [model.model.get_input_embeddings(), model.model.get_output_embeddings()]
    modules = [name for name, module in model.model.named_modules() if any(module is end for end in ends)]
    found = [job.names.parameter(f"{name}.{leaf}") for name in modules for leaf in ("weight", "bias")]
    return [parameter for parameter in found if parameter is not None]


def _is_replaced(job: Job, parameter: Parameter) -> bool:
    """Whether an adapter brings a new value for the parameter, or for the one it is tied to and stays tied to."""
    own = job.changes.get(parameter.name) or job.new.get(parameter.name)
    tied = [job.changes[name] for name in parameter.tied if name in job.changes]
    return any(change.value is not None for change in ([own] if own else tied))


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


def set_everywhere(config: dict, key: str, value: Any, *, old: Any = None) -> None:
    """Set a key in the config and its sub-configs where it is already there (with the value `old`, if that is given)."""
    if key in config and old in (None, config[key]):
        config[key] = value
    for sub in config.values():
        if isinstance(sub, dict):
            set_everywhere(sub, key, value, old=old)

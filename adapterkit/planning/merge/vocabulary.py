"""Vocabularies of another size than the base's, and heads that the base lacks."""

import re

from adapterkit.errors import shown
from adapterkit.planning.inputs.model_config import set_nested
from adapterkit.planning.merge.job import MergeJob
from adapterkit.weights.parameters import Parameter
from adapterkit.weights.skeleton import tied_names


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
    adapter = job.adapters[job.new[heads[0]].value_from - 1]
    names = ", ".join(map(shown, missing[:8])) + ", ..." * (len(missing) > 8)
    job.errors.add(
        f"{class_name} needs {names}, which neither base nor adapter has",
        "values for all parameters: transformers would make these up at random on every load",
        "use the base of the training, saved with these, or train them too (modules_to_save); "
        f"--exclude '{adapter.pattern_of(heads)}' leaves the head out",
        where=f"{job.base.name}, {adapter.name}",
    )

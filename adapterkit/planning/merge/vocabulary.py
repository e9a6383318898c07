"""Vocabularies of another size than the base's, and heads that the base lacks."""

import re

from adapterkit.errors import Refused, shown
from adapterkit.planning.merge.job import Job
from adapterkit.planning.merge.tied import set_everywhere
from adapterkit.weights.parameters import Parameter
from adapterkit.weights.skeleton import tied_names


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
                hint="save the adapter with both embeddings (save_embedding_layers=True)",
            )
        )
        return
    size, name = next(iter(resized.items()))
    staying = [
        p.name for p in _of_vocabulary(job) if p.shape[:1] == (old,) and not _is_replaced(job, p)
    ]
    if staying:
        job.errors.append(
            Refused(
                f"{shown(name)} has {size} rows, {shown(staying[0])} stays at {old}",
                expected="embedding and head of one size",
                where="adapters",
                hint="save the adapter with both (save_embedding_layers=True)",
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
    modules = [
        name for name, module in model.model.named_modules() if any(module is end for end in ends)
    ]
    found = [
        job.names.parameter(f"{name}.{leaf}") for name in modules for leaf in ("weight", "bias")
    ]
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
    _check_whole(job, class_name, heads)
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


def _check_whole(job: Job, class_name: str, heads: list[str]) -> None:
    """Every parameter of the class with the head has a value: transformers would make others up on every load."""
    model = job.names.model
    assert model is not None
    left = getattr(model.model, "_keys_to_ignore_on_load_missing", None) or ()
    known = model.parameters.keys() | model.unreadable.keys() | job.new.keys()
    ties = tied_names(model.model)
    lacking = [name for name in model.state if not known & {name, *ties.get(name, ())}]
    if not (
        lacking := [
            name for name in lacking if not any(re.search(pattern, name) for pattern in left)
        ]
    ):
        return
    bringing = next(a for a in job.adapters if a.number == job.new[heads[0]].number)
    names = ", ".join(map(shown, lacking[:8])) + ", ..." * (len(lacking) > 8)
    job.errors.append(
        Refused(
            f"{class_name} needs {names}, which neither base nor adapter has",
            expected="values for all parameters: transformers would make these up at random on every load",
            where=f"{job.base.name}, {bringing.name}",
            hint="use the base of the training, saved with these, or train them too (modules_to_save); "
            f"--exclude '{bringing.pattern_of(heads)}' leaves the head out",
        )
    )

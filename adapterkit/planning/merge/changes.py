"""From adapters to changes of parameters: replaced values, products and vectors added, trained rows."""

import math
from dataclasses import replace

from adapterkit.adapters.factors import rank_and_scale
from adapterkit.adapters.record import Adapter, Lora, inside, rank_mismatch
from adapterkit.checkpoint.header import TensorSpec
from adapterkit.errors import AdapterkitError, Refused, shown
from adapterkit.planning.merge.copies import settle_copies
from adapterkit.planning.merge.job import Change, Job, Part, nested
from adapterkit.planning.merge.orientation import oriented, targets
from adapterkit.weights.parameters import Parameter


def collect(job: Job) -> None:
    """Fill the job's changes from its adapters; what does not fit goes to its errors."""
    settle_copies(job)
    for adapter, weight in zip(job.adapters, job.weights, strict=True):
        _check_adapter(job, adapter, weight)
        _check_complete(job, adapter)
        _replacements(job, adapter)
        _products(job, adapter, weight)
        _tokens(job, adapter)
    _check_together(job)


def _check_adapter(job: Job, adapter: Adapter, weight: float) -> None:
    _compare_names(job, adapter)
    init = adapter.changed_base()
    if init is not None and not job.options.base_is_residual:
        job.errors.append(
            Refused(
                f"init_lora_weights {init!r}: this adapter was trained on a base that the init had changed",
                expected="an adapter of the base as it is",
                where=adapter.where,
                hint="give --base-is-residual if BASE is that changed base, or turn the adapter into a plain LoRA first "
                "(adapterkit rebase, or PEFT's path_initial_model_for_weight_conversion)",
            )
        )
    if weight != 1.0:
        _check_weighted(job, adapter, weight)


def _check_weighted(job: Job, adapter: Adapter, weight: float) -> None:
    """What has no multiple: values that take the place of the base's. --exclude leaves them as the base has them."""
    whole = [name for name in adapter.replaced if job.takes(name)]
    rows = [tokens.module for tokens in adapter.tokens if job.taken(tokens.module)]
    left = f"give --exclude '{adapter.pattern_of([*whole, *rows])}' to leave them as they are in BASE and add the factors alone"
    what: list[tuple[str, list[str], str]] = [
        (
            "DoRA",
            [x.module for x in adapter.loras if x.magnitude is not None and job.taken(x.module)],
            "merge it with weight 1; to take it out again keep the base",
        ),
        ("replaced parameters (modules_to_save, biases, embeddings)", whole, left),
        ("trained token rows", rows, left),
    ]
    for found, names, hint in what:
        if names:
            some = ", ".join(map(shown, names[:4])) + ", ..." * (len(names) > 4)
            expected = "weight 1: these are values, not additions"
            job.errors.append(
                Refused(
                    f"{found} with weight {weight:g}: {some}",
                    expected=expected,
                    where=adapter.label,
                    hint=hint,
                )
            )


def _compare_names(job: Job, adapter: Adapter) -> None:
    """A note where the adapter names another base on the Hub: shapes cannot tell two models of one size apart."""
    said = str(adapter.config.get("base_model_name_or_path"))
    base = str(job.original.folder.origin.get("repo") or job.original.name)
    on_hub = said.count("/") == 1 and not said.startswith(("/", ".", "~"))
    if on_hub and said.rpartition("/")[2].casefold() != base.rpartition("/")[2].casefold():
        job.notes.append(
            f"{adapter.name} was trained on {shown(said)}; the base here is {shown(base)}"
        )


def _check_complete(job: Job, adapter: Adapter) -> None:
    """What PEFT saves together is there: a saved module's whole state, and each bias that was trained."""
    names = job.names.all()
    expected: dict[str, str] = {}
    for module in adapter.saved:
        by_task = module not in (adapter.config.get("modules_to_save") or [])
        why = f"modules_to_save {shown(module)}" + " (by task_type)" * by_task
        expected |= dict.fromkeys(
            (name for name in names if inside(name, module) and job.takes(name)), why
        )
    if adapter.config.get("bias") == "all":
        expected |= dict.fromkeys(
            (n for n in names if n.rpartition(".")[2] == "bias"), 'bias "all"'
        )
    if adapter.config.get("bias") == "lora_only":
        biases = (f"{lora.module}.bias" for lora in adapter.loras)
        expected |= dict.fromkeys((n for n in biases if n in names), 'bias "lora_only"')
    for name, why in expected.items():
        parameter = job.names.parameter(name)
        if parameter is not None and not adapter.replaced.keys() & {name, *parameter.tied}:
            job.errors.append(
                Refused(
                    f"{why}, and the file holds no {shown(name)}",
                    expected="every tensor that was trained",
                    where=adapter.label,
                    hint="save the adapter again, or keep the base's with --exclude",
                )
            )


def _replacements(job: Job, adapter: Adapter) -> None:
    for name, spec in adapter.replaced.items():
        if not job.takes(name):
            job.leave_out(adapter, name)
            continue
        parameter = job.names.parameter(name)
        if parameter is None:
            _new_parameter(job, adapter, name, spec)
            continue
        if parameter.shape != spec.shape and not _resizes(job, parameter, spec):
            job.errors.append(job.misshaped(adapter, name, spec.shape, parameter.shape))
            continue
        change = job.change(parameter)
        if change.value is not None and not (
            name in adapter.copies and job.equal_bytes(change.value, spec)
        ):
            other = job.adapters[change.number - 1].name
            job.errors.append(
                Refused(
                    f"{shown(name)} is replaced by both {other} and {adapter.name}",
                    expected="one adapter for each replaced parameter",
                    where=adapter.label,
                    hint="leave one out with --exclude in a run of its own, or merge one adapter",
                )
            )
        change.value, change.number = spec, adapter.number
        change.parameter = replace(parameter, shape=spec.shape)
        change.adapters.append(adapter.name)


def _resizes(job: Job, parameter: Parameter, spec: TensorSpec) -> bool:
    """Whether the new value is an embedding (or head) of another vocabulary size, which a checkpoint may hold."""
    sizes = [v for v in nested(job.base.config, "vocab_size") if isinstance(v, int)]
    rows = parameter.shape[:1]
    same = parameter.shape[1:] == spec.shape[1:] and len(parameter.shape) in (1, 2)
    return same and bool(sizes) and (rows[0] in sizes or _is_embedding(job, parameter.name))


def _is_embedding(job: Job, name: str) -> bool:
    layer = job.names.layer(name.rpartition(".")[0])
    return layer is not None and "Embedding" in layer


def _new_parameter(job: Job, adapter: Adapter, name: str, spec: TensorSpec) -> None:
    if not adapter.saves(name) or job.names.layer(name.rpartition(".")[0]) is None:
        job.errors.append(job.unknown(adapter, spec.key, name))
        return
    parameter = Parameter(name, spec.shape, ())
    job.new[name] = Change(parameter, spec, adapters=[adapter.name], number=adapter.number)


def _products(job: Job, adapter: Adapter, weight: float) -> None:
    by_module: dict[str, list[Lora]] = {}
    for lora in adapter.loras:
        if job.taken(lora.module):
            by_module.setdefault(lora.module, []).append(lora)
        else:
            job.leave_out(adapter, lora.module)
    for module, loras in by_module.items():
        try:
            for name, leaf, lora in targets(job, adapter, module, loras):
                _product(job, adapter, weight, name, leaf, lora)
        except AdapterkitError as error:
            job.errors.append(error)


def _product(
    job: Job, adapter: Adapter, weight: float, name: str, leaf: str | None, lora: Lora
) -> None:
    parameter = job.names.parameter(name)
    assert parameter is not None
    shape = job.changes[name].parameter.shape if name in job.changes else parameter.shape
    parameter = replace(parameter, shape=shape)
    rank, scale = rank_and_scale(adapter, lora, leaf)
    if lora.bias is not None:
        _bias(job, adapter, lora, scale * weight)
    product, outputs = oriented(job, adapter, parameter, lora, leaf, scale * weight)
    if product.rank != rank:
        raise rank_mismatch(adapter, lora, product.rank, rank)
    if lora.magnitude is not None and product.experts is not None:
        raise Refused(
            f"DoRA on the stack {shown(name)}",
            expected="a plain LoRA there",
            where=adapter.label,
            hint="leave it out with --exclude",
        )
    if lora.magnitude is not None and math.prod(lora.magnitude.shape) != parameter.shape[outputs]:
        raise job.misshaped(
            adapter, lora.magnitude.key, lora.magnitude.shape, (parameter.shape[outputs],)
        )
    first = (
        lora.kind == "embedding"
        or leaf is not None
        or not name.endswith(".weight")
        or adapter.attention(lora) is not None
    )
    part = Part(adapter, lora, product, None, scale * weight, lora.magnitude, outputs, first)
    change = job.change(parameter)
    change.parts.append(part)
    change.adapters.append(adapter.name)


def _bias(job: Job, adapter: Adapter, lora: Lora, scale: float) -> None:
    assert lora.bias is not None
    parameter = job.names.parameter(f"{lora.module}.bias")
    if parameter is None:
        found = (
            f"{shown(lora.bias.key)}: a bias for {shown(lora.module)}, which has none in the base"
        )
        hint = "merge into a model whose module has a bias"
        job.errors.append(
            Refused(found, expected="a module with a bias", where=adapter.label, hint=hint)
        )
        return
    if parameter.shape != lora.bias.shape:
        job.errors.append(job.misshaped(adapter, lora.bias.key, lora.bias.shape, parameter.shape))
        return
    change = job.change(parameter)
    change.parts.append(Part(adapter, lora, None, lora.bias, scale))
    change.adapters.append(adapter.name)


def _check_rows(job: Job, adapter: Adapter) -> None:
    """Each module of trainable_token_indices has its rows in the file, or is tied to one that has (PEFT saves those once)."""
    asked = adapter.config.get("trainable_token_indices")
    parameters = [job.names.parameter(f"{tokens.module}.weight") for tokens in adapter.tokens]
    held = {name for p in parameters if p is not None for name in (p.name, *p.tied)} | {
        f"{t.module}.weight" for t in adapter.tokens
    }
    for module in asked if isinstance(asked, dict) else ():
        if not any(name.endswith(f"{module}.weight") for name in held):
            job.errors.append(
                Refused(
                    f"trainable_token_indices of {shown(module)}, and the file holds none of its rows",
                    expected="its trained rows",
                    where=adapter.where,
                    hint="save the adapter again",
                )
            )


def _tokens(job: Job, adapter: Adapter) -> None:
    _check_rows(job, adapter)
    for tokens in adapter.tokens:
        name = f"{tokens.module}.weight"
        if not job.taken(tokens.module):
            job.leave_out(adapter, tokens.module)
            continue
        parameter = job.names.parameter(name)
        if parameter is None:
            job.errors.append(job.unknown(adapter, tokens.values.key, name))
            continue
        shape = job.changes[name].parameter.shape if name in job.changes else parameter.shape
        above = [i for i in tokens.indices if i >= shape[0]]
        if len(tokens.values.shape) != 2 or tokens.values.shape[1] != shape[1] or above:
            job.errors.append(
                Refused(
                    f"{shown(tokens.values.key)} {tokens.values.shape} for rows {shown(str(above or tokens.indices))}",
                    expected=f"rows of {shown(name)}, which has shape {shape}",
                    where=adapter.label,
                    hint="use a base whose vocabulary was resized as in training",
                )
            )
            continue
        change = job.change(replace(parameter, shape=shape))
        change.rows.append((tokens.values, tokens.indices))
        change.adapters.append(adapter.name)


def _check_together(job: Job) -> None:
    for name, change in job.changes.items():
        numbers = {part.adapter.number for part in change.parts}
        decomposed = [part for part in change.parts if part.magnitude is not None]
        if decomposed and len(numbers) > 1 and job.options.compat != "peft":
            job.errors.append(
                Refused(
                    f"{shown(name)}: DoRA of {decomposed[0].adapter.name} beside another adapter",
                    expected="one adapter on a module that DoRA rescales: the result depends on the order",
                    where="adapters",
                    hint="merge one after the other, or give --compat peft for PEFT's order",
                )
            )
        rows = [i for _, indices in change.rows for i in indices]
        if len(set(rows)) != len(rows):
            job.errors.append(
                Refused(
                    f"{shown(name)}: a token row trained by two adapters",
                    expected="one adapter for each row",
                    where="adapters",
                    hint="merge one of them",
                )
            )

"""Turn adapters into changes of parameters: replaced values, added products and vectors, and
trained rows."""

import math
from collections.abc import Sequence
from dataclasses import replace

from adapterkit.core import dtypes
from adapterkit.core.adapter.factors import Factors, rank_and_scale
from adapterkit.core.adapter.record import EMBEDDINGS, Adapter, Lora, is_inside, rank_mismatch
from adapterkit.core.checkpoint.fingerprint import difference
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.commands import PLAIN, WITHOUT_INITIAL
from adapterkit.core.errors import WARNING, Refused, listed, shown
from adapterkit.core.inputs.earlier_merges import merged_change, same_merges
from adapterkit.core.inputs.model_config import vocabulary_sizes
from adapterkit.core.merge.job import Change, MergeState
from adapterkit.core.merge.sites import flips_square_experts, sites_of
from adapterkit.core.weights.codec import QuantizedWeight
from adapterkit.core.weights.parameters import Parameter


def resolve_targets(
    state: MergeState, adapter: Adapter, module: str, loras: list[Lora]
) -> list[tuple[str, str | None, Lora]]:
    """The parameter of each of a module's factor pairs, with its own name if target_parameters has
    it. `Refused` if no parameter fits, or several do."""
    own, leaves, candidates = None, [], []
    if adapter.config.get("target_parameters") or any(lora.depth for lora in loras):
        own = state.names.children(module)
        candidates = own if own is not None else state.leaves.get(module, [])
        leaves = [] if loras[0].kind == "embedding" else adapter.leaves(module, candidates)
    if not leaves and all(lora.depth == 0 for lora in loras):
        for leaf in ("weight", "in_proj_weight"):
            if state.names.parameter(f"{module}.{leaf}") is not None:
                return [(f"{module}.{leaf}", None, loras[0])]
    leaves = leaves or adapter.leaves(module) or candidates
    if not any(state.names.parameter(f"{module}.{leaf}") for leaf in leaves):
        raise state.unknown_error(adapter, loras[0].a.key, module)
    number, names = adapter.number, state.names
    sites = sites_of(module, {number: loras}, {number: leaves}, {number: adapter}, own, names)
    if any(site.leaf is None for site in sites):
        raise Refused(
            f"{shown(loras[0].a.key)} fits several parameters of {shown(module)}: "
            f"{', '.join(map(shown, leaves))}",
            expected="one parameter (PEFT's file names the nesting, not the parameter)",
            where=adapter.label,
            hint="use a transformers that knows the model, or give target_parameters as they were "
            "in training",
            code="AK402",
        )
    return [(site.name, site.leaf, site.members[number]) for site in sites]


def orient(
    state: MergeState,
    adapter: Adapter,
    parameter: Parameter,
    lora: Lora,
    leaf: str | None,
    scale: float,
) -> Factors:
    """The factors of scale · b @ a, oriented as the parameter is.

    A matrix that is a target itself (named `leaf`) is read in its stored orientation, whatever its
    module's class, because PEFT's ParamWrapper does so. For a module's weight or a stack the shapes
    decide; if they fit both ways, the module's class does. `Refused` if the factors do not fit."""
    shape, a, b = parameter.shape, lora.a.shape, lora.b.shape
    rank, experts, flip = a[0], None, False
    is_matrix = len(shape) == len(a) == len(b) == 2
    if lora.kind == "embedding":
        fits, flip = is_matrix and (a[1], b[0]) == shape and rank == b[1], True
    elif len(shape) > 3 or (len(shape) == 3 and len(a) == 3):
        _check_groups(state, adapter, parameter, lora)
        fits = b[:1] + a[1:] == shape and all(n == 1 for n in b[2:])
    elif len(shape) == 3:
        experts, *matrix = shape
        rank, rest = divmod(a[0], experts)
        as_is, flip = matrix == [b[0], a[-1]], matrix == [a[-1], b[0]]
        fits = not rest and b[1] == a[0] and (as_is or flip)
        if fits and as_is and flip:
            transposed = state.names.transposed_experts(parameter.name.rpartition(".")[0])
            layout = state.options.expert_layout
            hint = "give --expert-layout peft-0.18 or --expert-layout peft-0.19"
            flip = flips_square_experts(adapter, parameter.name, transposed, layout, hint)
    else:
        as_is = is_matrix and shape == (b[0], a[1])
        flip = is_matrix and shape == (a[1], b[0]) and a[0] == b[1] and leaf is None
        flip = flip and state.names.transposed(
            lora.module,
            fan_in_fan_out=bool(adapter.config.get("fan_in_fan_out")),
            square=as_is,
            where=adapter.label,
        )
        fits = is_matrix and a[0] == b[1] and (flip or as_is)
    if not fits:
        raise state.shape_error(adapter, lora.a.key, f"{a}, with lora_B {b}", shape)
    return Factors.of(lora, scale, rank, experts, flip, leaf)


def _check_groups(state: MergeState, adapter: Adapter, parameter: Parameter, lora: Lora) -> None:
    module = parameter.name.rpartition(".")[0]
    groups = state.names.groups(module)
    if groups > 1 or lora.b.shape[1:2] != lora.a.shape[:1]:
        raise Refused(
            f"a grouped convolution: {shown(module)} has {groups} groups",
            expected="groups 1 (PEFT cannot merge these either)",
            where=adapter.label,
            hint="exclude it with --exclude",
            code="AK406",
        )


QUANTIZED = 0.3  # the most by which a weight differs from its original, relative to its norm
ROUNDING = 2.0**-8  # error that bf16 adds to the relative change in a receipt


def _trained(state: MergeState, adapter: Adapter) -> dict[str, TensorSpec]:
    """The adapter's replaced parameters that are not copies of the base's.

    Copies that differ from the base are refused, unless the option says which weight counts: the
    base's ("ignore") or the copy ("adapter", as in PEFT)."""
    from adapterkit.core.merge.value_comparison import decoded_difference, differing_rows

    trained, differing = dict(adapter.replaced), {}
    explained: list[str] = []
    quantized: list[str] = []
    for name, spec in adapter.replaced.items():
        is_copy = name in adapter.copies
        is_automatic = (
            EMBEDDINGS.search(name) and not adapter.saves(name) and not name.endswith("bias")
        )
        if not (is_copy or is_automatic) or not state.is_selected_value(name):
            continue
        parameter = state.names.parameter(name)
        if parameter is None or parameter.shape != spec.shape:
            continue  # another vocabulary
        if not spec.shape or spec.dtype not in dtypes.FLOATS:
            continue  # refused when the file was read
        stored = state.base.tensors[parameter.slots[0].key]
        is_plain = type(stored) is TensorSpec and stored.dtype in dtypes.FLOATS
        comparable = parameter.is_full_tensor and is_plain
        copy, count, error = (adapter.folder, spec), spec.shape[0], None
        if comparable:
            count = differing_rows(copy, (state.base.folder, stored))
        elif (
            parameter.is_full_tensor
            and isinstance(stored, QuantizedWeight)
            and state.options.embedding_copies is None
        ):
            error = decoded_difference(copy, (state.base.folder, stored))
        if count == 0 or (is_copy and state.options.embedding_copies == "ignore"):
            del trained[name]
        elif error is not None and error < QUANTIZED:
            del trained[name]
            quantized.append(f"{shown(spec.key)} ({error:.0%})")
            continue
        may_explain = count and is_copy and comparable and not state.options.embedding_copies
        if may_explain and _is_of_original(state, adapter, spec, stored):
            del trained[name]
            explained.append(spec.key)
        elif count and is_copy:
            differing[spec.key] = (
                f"{count} of {spec.shape[0]} rows differ"
                if comparable
                else "the base's is quantized"
            )
    _report_copies(state, adapter, quantized, explained, differing)
    return trained


def _report_copies(
    state: MergeState,
    adapter: Adapter,
    quantized: list[str],
    explained: list[str],
    differing: dict[str, str],
) -> None:
    """Note copies of weights that the base has quantized or merged into; refuse copies of other
    weights. Keys identify the copies."""
    if quantized:
        state.notes.append(
            f"{adapter.name}: copies of weights that the base has quantized are ignored; they "
            f"differ by {listed(quantized)}; --embedding-copies adapter starts from them"
        )
    if explained:
        state.notes.append(
            f"{adapter.name}: {listed(explained)}: copies of the base's weights before the merges "
            "in its receipt; they are ignored"
        )
    text = ", ".join(f"{shown(key)} ({difference})" for key, difference in differing.items())
    if differing and state.options.embedding_copies is None:
        state.errors.add(
            f"copies of another base's weights: {text}",
            "the base that the adapter was trained on",
            "if another adapter was merged into BASE, give --embedding-copies ignore to add to its "
            "weights as they are; --embedding-copies adapter starts from the copies instead, as "
            "PEFT does",
            where=adapter.label,
            code="AK403",
        )
    elif differing:
        effect = "ignored" if state.options.embedding_copies == "ignore" else "replace the base's"
        state.notes.append(f"{adapter.name}: copies of another base's weights {effect}: {text}")


def _is_of_original(
    state: MergeState, adapter: Adapter, copy: TensorSpec, stored: TensorSpec
) -> bool:
    """Return whether a copy is from the base before the merges in its receipt: this adapter is one
    of them, or the copy differs by about as much as the last merge changed."""
    from adapterkit.core.merge.value_comparison import relative_difference

    if not state.merged_before:
        return False
    if same_merges(state.merged_before, adapter):
        return True
    changed = merged_change(state.original.folder, stored.key)
    sides = (state.base.folder, stored), (adapter.folder, copy)
    return changed > 0 and relative_difference(*sides) <= 1.1 * changed + ROUNDING


def collect_changes(state: MergeState) -> None:
    """Fill the job's changes from its adapters, and collect an error for everything that does not
    fit."""
    state.adapters = [
        replace(one, replaced=_trained(state, one)) if one.replaced else one
        for one in state.adapters
    ]
    for adapter in state.adapters:
        _check_adapter(state, adapter)
        if adapter.saved or adapter.config.get("bias") in ("all", "lora_only"):
            _check_complete(state, adapter)
        if adapter.replaced:
            _add_values(state, adapter)
        _add_products(state, adapter)
        for other in adapter.others:
            with state.errors.collected():
                other.add_to(state, adapter)
        if adapter.tokens or adapter.config.get("trainable_token_indices"):
            _check_rows(state, adapter)
            _add_rows(state, adapter)
    if state.module_weights is not None:
        state.errors += state.module_weights.problems()
        state.notes += state.module_weights.notes()
    if state.methods is not None:
        _check_method(state)
    if state.options.base_is_residual or any(one.base_change for one in state.adapters):
        from adapterkit.core.merge.initial_factors import check

        check(state)
    _check_together(state)


def _check_adapter(state: MergeState, adapter: Adapter) -> None:
    if adapter.base_fingerprint is not None:
        state.notes += other_values(state, adapter)
    state.notes += other_base(state, adapter)
    init = adapter.changed_base()
    if adapter.number in state.with_initial:
        _check_initial(state, adapter)
    elif init is not None and not state.options.base_is_residual:
        state.errors.add(
            f"init_lora_weights {init!r}: this adapter was trained on a base that the init had "
            "changed",
            "an adapter of the base as it is",
            "give --base-is-residual if BASE is that changed base, or make a plain LoRA first (in "
            "PEFT: path_initial_model_for_weight_conversion)\n"
            "adapterkit rebase ADAPTER --initial INITIAL --out plain",
            where=adapter.where,
            code="AK304",
        )
    has_magnitudes = any(lora.magnitude is not None for lora in adapter.loras)
    if has_magnitudes or adapter.replaced or adapter.tokens:
        with state.errors.collected():
            _check_weighted(state, adapter)


def _check_initial(state: MergeState, adapter: Adapter) -> None:
    """Refuse initial factors on other modules than the adapter's."""
    pair = adapter, state.adapter(adapter.number + 1)
    modules, others = ({(lora.module, lora.depth) for lora in one.loras} for one in pair)
    if different := sorted(module for module, _ in modules ^ others):
        state.errors.add(
            f"only one of the adapter and its initial factors has {listed(different)}",
            "the same modules in both",
            "keep the folder that `adapterkit init` wrote together",
            where=adapter.label,
            code="AK304",
        )


def _check_weighted(state: MergeState, adapter: Adapter) -> None:
    """Refuse weights other than 1 for values that replace the base's, unless --exclude leaves them
    out."""
    values = [
        name
        for name in adapter.replaced
        if state.is_selected_value(name) and state.weight(adapter, name.rpartition(".")[0]) != 1.0
    ]
    rows = [
        tokens.module
        for tokens in adapter.tokens
        if state.is_selected(tokens.module) and state.weight(adapter, tokens.module) != 1.0
    ]
    doras = [
        lora.module
        for lora in adapter.loras
        if lora.magnitude is not None
        and state.changes_module(adapter, lora.module)
        and state.weight(adapter, lora.module) != 1.0
    ]
    options = state.options
    weight = f"{state.weights[adapter.number - 1]:g}"
    by_module = options.weight_for or options.lbw or state.file is not None
    weight = "other than 1" if by_module else weight
    for kind, names in [
        ("DoRA", doras),
        ("replaced parameters (modules_to_save, biases, embeddings)", values),
        ("trained token rows", rows),
    ]:
        if names:
            hint = "merge it with weight 1; to unmerge it later keep the base"
            if names is not doras:
                hint = _without_values(adapter, [*values, *rows])
            some = ", ".join(map(shown, names[:4])) + ", ..." * (len(names) > 4)
            state.errors.add(
                f"{kind} with weight {weight}: {some}",
                "weight 1: these are values, not additions",
                hint,
                where=adapter.label,
                code="AK107",
            )


def other_values(state: MergeState, adapter: Adapter) -> list[str]:
    """A warning if the adapter was made for a base of the same tensors with other values, by its
    fingerprint."""
    made_for = adapter.base_fingerprint
    if made_for is None or difference(made_for, state.fingerprint) != "values":
        return []
    return [
        f"{WARNING}{adapter.name} was made for a base with other values than "
        f"{state.original.name} (fingerprint {made_for}, not {state.fingerprint})"
    ]


def other_base(state: MergeState, adapter: Adapter) -> list[str]:
    """Notes on an adapter whose fingerprint has other names or shapes than the base, or that names
    another base on the Hub. Shapes do not distinguish two models of one size."""
    made_for, notes = adapter.base_fingerprint, []
    differs = None if made_for is None else difference(made_for, state.fingerprint)
    if differs in ("", "values"):
        return []
    if differs is not None:
        what = "dtypes of tensors" if differs == "dtypes" else "names or shapes of tensors"
        notes.append(f"{adapter.name} was made for a base with other {what}")
    named = str(adapter.config.get("base_model_name_or_path"))
    base = str(state.original.folder.origin.get("repo") or state.original.name)
    on_hub = named.count("/") == 1 and not named.startswith(("/", ".", "~"))
    if on_hub and named.rpartition("/")[2].casefold() != base.rpartition("/")[2].casefold():
        notes.append(
            f"{adapter.name} was trained on {shown(named)}; the base here is {shown(base)}"
        )
    return notes


def _without_values(adapter: Adapter, names: list[str]) -> str:
    """A hint to leave replaced values out."""
    from adapterkit.core.adapter.selection import ends_of, text_of_entries

    own = text_of_entries(ends_of(adapter, names))
    return f'give --exclude "{own}" to leave them as they are in BASE and add the factors alone'


def _check_complete(state: MergeState, adapter: Adapter) -> None:
    """Refuse a file without some of the tensors that PEFT saves together: the whole state of a
    saved module, each bias that was trained."""
    names = state.names.all()
    expected: dict[str, str] = {}
    for module in adapter.saved:
        by_task = module not in (adapter.config.get("modules_to_save") or [])
        reason = f"modules_to_save {shown(module)}" + " (by task_type)" * by_task
        within = (
            name for name in names if is_inside(name, module) and state.is_selected_value(name)
        )
        expected |= dict.fromkeys(within, reason)
    if adapter.config.get("bias") == "all":
        biases = (name for name in names if name.rpartition(".")[2] == "bias")
        expected |= dict.fromkeys(biases, 'bias "all"')
    if adapter.config.get("bias") == "lora_only":
        modules = [*(lora.module for lora in adapter.loras), *(x.target for x in adapter.others)]
        biases = (f"{module}.bias" for module in modules)
        expected |= dict.fromkeys((name for name in biases if name in names), 'bias "lora_only"')
    for name, reason in expected.items():
        parameter = state.names.parameter(name)
        if parameter is not None and not adapter.replaced.keys() & {name, *parameter.tied}:
            state.errors.add(
                f"{reason}, and the file has no {shown(name)}",
                "every tensor that was trained",
                "save the adapter again, or keep the base's with --exclude",
                where=adapter.label,
                code="AK302",
            )


def _add_values(state: MergeState, adapter: Adapter) -> None:
    for name, spec in adapter.replaced.items():
        if not state.is_selected_value(name):
            state.skip(adapter, name)
            continue
        parameter = state.names.parameter(name)
        if parameter is None:
            _add_new_parameter(state, adapter, name, spec)
            continue
        if parameter.shape != spec.shape and not _is_resized_vocabulary(state, parameter, spec):
            state.errors.append(state.shape_error(adapter, name, spec.shape, parameter.shape))
            continue
        change = state.change(parameter)
        if change.value is not None and not (
            name in adapter.copies and state.same_bytes(change.value, spec)
        ):
            other = state.adapter(change.value_from).name
            state.errors.add(
                f"{shown(name)} is replaced by both {other} and {adapter.name}",
                "one adapter for each replaced parameter",
                "exclude one with --exclude in a run of its own, or merge one adapter",
                where=adapter.label,
                code="AK305",
            )
        change.value, change.value_from = spec, adapter.number
        change.parameter = replace(parameter, shape=spec.shape)
        change.adapters.append(adapter.name)


def _is_resized_vocabulary(state: MergeState, parameter: Parameter, spec: TensorSpec) -> bool:
    """Return whether the new value is an embedding or head of another vocabulary size, which a
    checkpoint may have."""
    sizes = vocabulary_sizes(state.base.config)
    if parameter.shape[1:] != spec.shape[1:] or len(parameter.shape) not in (1, 2) or not sizes:
        return False
    layer = state.names.layer(parameter.name.rpartition(".")[0])
    return parameter.shape[0] in sizes or "Embedding" in (layer or "")


def _add_new_parameter(state: MergeState, adapter: Adapter, name: str, spec: TensorSpec) -> None:
    if not adapter.saves(name) or state.names.layer(name.rpartition(".")[0]) is None:
        state.errors.append(state.unknown_error(adapter, spec.key, name))
        return
    parameter = Parameter(name, spec.shape, ())
    state.new[name] = Change(parameter, spec, adapters=[adapter.name], value_from=adapter.number)


def _add_products(state: MergeState, adapter: Adapter) -> None:
    by_module: dict[str, list[Lora]] = {}
    for lora in adapter.loras:
        if state.changes_module(adapter, lora.module):
            by_module.setdefault(lora.module, []).append(lora)
        else:
            state.skip(adapter, lora.module)
    for module, loras in by_module.items():
        if state.names.model is not None:
            check_acting(state, adapter, module, "factors", loras)
        with state.errors.collected():
            for name, leaf, lora in resolve_targets(state, adapter, module, loras):
                _add_product(state, adapter, name, leaf, lora)


def check_acting(
    state: MergeState, adapter: Adapter, module: str, what: str, loras: Sequence[Lora] = ()
) -> None:
    """Refuse factors that had no effect in training, or another effect than in a merged weight.
    Zero factors are allowed, because training leaves factors without effect at zero."""
    from adapterkit.core.weights.layers import looks_up_otherwise, weight_reader

    if reader := weight_reader(state.names, module):
        reason = f"whose weight {reader} reads itself: PEFT's have no effect there before a merge"
    elif looks_up_otherwise(classes := state.names.classes(module)):
        reason = f"a {classes[0].__name__} with a forward of its own, which PEFT's act after"
    else:
        return
    if not loras or not all(map(state.is_zero, loras)):
        state.errors.add(
            f"{what} of {shown(module)}, {reason}",
            f"{what} that act as a change of the weight",
            f'give --exclude "{shown(module.rpartition(".")[2])}" to leave them out',
            where=adapter.label,
            code="AK406",
        )


def _add_product(
    state: MergeState, adapter: Adapter, name: str, leaf: str | None, lora: Lora
) -> None:
    """Add the product of a factor pair; raises `Refused` if it does not fit the parameter or the
    config."""
    parameter = state.names.parameter(name)
    assert parameter is not None
    shape = state.changes[name].parameter.shape if name in state.changes else parameter.shape
    parameter = replace(parameter, shape=shape)
    rank, scale = rank_and_scale(adapter, lora, leaf)
    site = lora.module if leaf is None else name
    if lora.bias is not None:
        _add_bias(state, adapter, lora, scale * state.weight(adapter, site))
    factors = orient(state, adapter, parameter, lora, leaf, scale)
    if factors.rank != rank:
        raise rank_mismatch(adapter, lora, factors.rank, rank)
    if state.file is None or state.module_weights is None:
        weight = state.weight(adapter, factors.module)
    else:  # with the weights of its directions
        weight, factors = state.module_weights.rules.on(adapter.number - 1, site, factors)
        if not weight:
            state.skip(adapter, site)
            return
    factors = replace(factors, scale=scale * (1 if state.methods else weight))
    magnitude = lora.magnitude
    if magnitude is not None and factors.experts is not None:
        raise Refused(
            f"DoRA on the stack {shown(name)}",
            expected="a plain LoRA there",
            where=adapter.label,
            hint="exclude it with --exclude",
            code="AK406",
        )
    outputs = shape[1 if factors.flip else 0]
    if magnitude is not None and math.prod(magnitude.shape) != outputs:
        raise state.shape_error(adapter, magnitude.key, magnitude.shape, (outputs,))
    change = state.change(parameter)
    change.additions.append(factors)
    change.weights[adapter.number] = weight
    change.adapters.append(adapter.name)


def _add_bias(state: MergeState, adapter: Adapter, lora: Lora, scale: float) -> None:
    assert lora.bias is not None
    parameter = state.names.parameter(f"{lora.module}.bias")
    if parameter is None:
        state.errors.add(
            f"{shown(lora.bias.key)}: a bias for {shown(lora.module)}, which has none in the base",
            "a module with a bias",
            "merge into a model whose module has a bias",
            where=adapter.label,
            code="AK401",
        )
        return
    if parameter.shape != lora.bias.shape:
        state.errors.append(
            state.shape_error(adapter, lora.bias.key, lora.bias.shape, parameter.shape)
        )
        return
    change = state.change(parameter)
    change.vectors.append((lora.bias, scale))
    change.adapters.append(adapter.name)


def _check_rows(state: MergeState, adapter: Adapter) -> None:
    """Refuse a file without the rows of a module in trainable_token_indices. A tied module whose
    rows are stored under the other name is allowed, because PEFT saves them once."""
    declared = adapter.config.get("trainable_token_indices")
    names = {f"{tokens.module}.weight" for tokens in adapter.tokens}
    for parameter in [state.names.parameter(name) for name in names]:
        names |= set() if parameter is None else {parameter.name, *parameter.tied}
    for module in declared if isinstance(declared, dict) else ():
        if not any(name.endswith(f"{module}.weight") for name in names):
            state.errors.add(
                f"trainable_token_indices of {shown(module)}, and the file has none of its rows",
                "its trained rows",
                "save the adapter again",
                where=adapter.where,
                code="AK302",
            )


def _add_rows(state: MergeState, adapter: Adapter) -> None:
    for tokens in adapter.tokens:
        name = f"{tokens.module}.weight"
        if not state.is_selected(tokens.module):
            state.skip(adapter, tokens.module)
            continue
        parameter = state.names.parameter(name)
        if parameter is None:
            state.errors.append(state.unknown_error(adapter, tokens.values.key, name))
            continue
        check_acting(state, adapter, tokens.module, "rows")
        shape = state.changes[name].parameter.shape if name in state.changes else parameter.shape
        above = [i for i in tokens.indices if i >= shape[0]]
        if len(tokens.values.shape) != 2 or tokens.values.shape[1] != shape[1] or above:
            state.errors.add(
                f"{shown(tokens.values.key)} {tokens.values.shape} for rows "
                f"{shown(str(above or tokens.indices))}",
                f"rows of {shown(name)}, which has shape {shape}",
                "use a base whose vocabulary was resized as in training",
                where=adapter.label,
                code="AK403",
            )
            continue
        change = state.change(replace(parameter, shape=shape))
        change.rows.append((tokens.values, tokens.indices))
        change.adapters.append(adapter.name)


def _check_method(state: MergeState) -> None:
    """Refuse changes that are not deltas, because a method combines deltas only."""
    name = f"--method {state.options.method}"
    for adapter in state.adapters:
        doras = [lora.module for lora in adapter.loras if lora.magnitude is not None]
        biased = [lora.module for lora in adapter.loras if lora.bias is not None]
        kinds = {"DoRA, whose delta depends on the base": doras, "biases of factors": biased}
        for what, modules in kinds.items():
            if own := [module for module in modules if state.is_selected(module)]:
                state.errors.add(
                    f"{name} and {what}: {listed(own)}",
                    "plain deltas",
                    PLAIN if modules is doras else "remove --method",
                    where=adapter.label,
                    code="AK401",
                )
    if state.with_initial:
        numbers = sorted(state.with_initial)
        state.errors.add(
            f"{name} and adapters with initial factors",
            "plain deltas",
            WITHOUT_INITIAL,
            where=", ".join(state.adapter(number).name for number in numbers),
            code="AK401",
        )


def _check_together(state: MergeState) -> None:
    """Refuse changes of one parameter by several adapters if their order would matter."""
    for name, change in state.changes.items():
        numbers = {one.a.folder for one in change.additions}
        numbers |= {number for one, _ in change.deltas for number in one.folders}
        doras = {one.a.folder: "DoRA" for one in change.additions if one.magnitude is not None}
        others = {one.folders[-1]: one.kind for one, _ in change.deltas if one.needs_base}
        if others:
            numbers |= {one.folder for one, _ in (*change.vectors, *change.rows)}
            numbers |= {change.value_from} if change.value is not None else set()
        if len(numbers) > 1 and (others or (doras and state.options.compat != "peft")):
            number, kind = next(iter((doras | others).items()))
            state.errors.add(
                f"{shown(name)}: {kind} of {state.adapter(number).name} and another adapter",
                f"one adapter on a module that {kind} changes: the result depends on the order",
                "merge one after the other"
                + ", or give --compat peft for PEFT's order" * (not others),
                code="AK305",
            )
        rows = [i for _, indices in change.rows for i in indices]
        if len(set(rows)) != len(rows):
            state.errors.add(
                f"{shown(name)}: a token row trained by two adapters",
                "one adapter for each row",
                "merge one of them",
                code="AK305",
            )

"""Plan a merge from the headers: adapters into a base, W' = round(W + Σ weight·scale·b@a)."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from adapterkit.core import dtypes
from adapterkit.core.adapter.keys import ADDED_DELTAS
from adapterkit.core.adapter.peft import scan_adapter
from adapterkit.core.adapter.record import Adapter
from adapterkit.core.checkpoint import layout
from adapterkit.core.checkpoint.folder import Folder
from adapterkit.core.checkpoint.hub_ids import is_on_hub
from adapterkit.core.checkpoint.reader import read_small
from adapterkit.core.checkpoint.shards import stem_of
from adapterkit.core.checkpoint.spec import Checkpoint, open_checkpoint
from adapterkit.core.commands import WITHOUT_INITIAL
from adapterkit.core.errors import AdapterkitError, Damaged, Problems, Refused, shown
from adapterkit.core.inputs.base_door import Base, kind_of
from adapterkit.core.inputs.earlier_merges import history_notes, merged_adapters
from adapterkit.core.inputs.input_identity import plan_of
from adapterkit.core.inputs.model_config import nested_values, set_nested
from adapterkit.core.inputs.sources import (
    initial_of,
    open_adapter,
    open_model,
    open_statistics,
    open_weighted,
)
from adapterkit.core.merge.changes import collect_changes
from adapterkit.core.merge.job import MergeState, nothing_selected
from adapterkit.core.merge.steps import plan_steps
from adapterkit.core.merge.tied import resolve_new_head, resolve_tied_weights, resolve_vocab_resize
from adapterkit.core.merge.verb import Merge, MergeOptions
from adapterkit.core.options import StrPath, flag_of, parse_size
from adapterkit.core.outputs.cards import Merged, merged_card
from adapterkit.core.outputs.folder_files import model_files, tokenizer_files
from adapterkit.core.outputs.model import (
    check_gaps,
    plan_laid_out,
    plan_shard,
    plan_shards_of_size,
    rounding_warnings,
)
from adapterkit.core.plan import Files, OutputFile, Plan, Step
from adapterkit.core.registry import load
from adapterkit.core.shared_options import check_has_statistics
from adapterkit.core.weights.codec import QuantizedWeight, check_writable
from adapterkit.core.weights.decoded import decoded_view, quantization_files, quantized_weights
from adapterkit.core.weights.detect import CONFIG_KEYS, check_not_quantized
from adapterkit.core.weights.parameters import known_slots
from adapterkit.doors import ADAPTERS, CONTAINERS, MERGES

if TYPE_CHECKING:
    from adapterkit.bases.gguf.imatrix import ImportanceFile
    from adapterkit.core.adapter.selection import Selection
    from adapterkit.core.inputs.weights_file import WeightsFile
    from adapterkit.verbs.combine.module_methods import WeightOf

Steps = dict[str, list[Step]]  # by output file


def plan_merge_of(merge: Merge) -> Plan:
    """The plan of a merge with its options."""
    if merge.push is not None and is_on_hub(merge.out):
        raise Refused(
            "--push does not apply to an output on the Hub",
            expected="one destination",
            where="--push",
            hint="remove --push",
            code="AK102",
        )
    base, options = kind_of(open_model(merge.base)), merge.only(MergeOptions)
    if own := base.own("merge"):
        return own(base, merge, options)
    name = base.output_file(merge.out)
    layout = options.expert_layout
    opener = partial(open_adapter, base=base.folder, for_merge=True, expert_layout=layout)
    if merge.weights is None:
        adapters, weights = open_weighted(merge.adapters, opener), None
    else:
        from adapterkit.core.inputs.weights_file import open_with_weights

        adapters, weights = open_with_weights(merge.adapters, merge.weights, opener)
    stats = None if merge.stats is None else open_statistics(merge.stats)
    imatrix = None if merge.imatrix is None else importance_of(merge.imatrix)
    if merge.original is None:
        more = {"file": name, "imatrix": imatrix, "weights": weights}
        return plan_merge(base, adapters, options, stats, **more)
    return plan_merge_into_original(merge.base, merge.original, adapters, options, stats, weights)


def importance_of(text: StrPath) -> "ImportanceFile":
    """The importance file that weights the errors of blocks; `Refused` or `Damaged` for another
    file."""
    return load(CONTAINERS[".gguf"]["importance"])(text)


def plan_merge(
    base: Base,
    sources: list[tuple[Folder, float]],
    options: MergeOptions,
    stats: Folder | None = None,
    *,
    file: str | None = None,
    imatrix: "ImportanceFile | None" = None,
    weight_of: "WeightOf | None" = None,
    weights: "WeightsFile | None" = None,
    selection: "Selection | None" = None,
) -> Plan:
    """The plan of a merge of these adapters with these weights.

    `stats`: the covariances that compensated rounding needs; `file`: the name of a single-file
    output; `imatrix`: the importances of its blocks; `weight_of`: a pipeline's weights of this
    component's modules; `weights`: weights of modules and directions; `selection`: that of all
    components, whose caller refuses entries that match nothing. Raises `Refused` or `Damaged` with
    all problems."""
    check_has_statistics(options.rounding, stats)
    base.check_options(options, imatrix, file)
    state, errors = open_merge(base, sources, options, weight_of, weights, selection)
    steps, statistics = changed_steps(state, errors), None
    state.notes += (note for adapter in state.adapters for note in _lost_shards(adapter))
    if stats is not None:
        statistics = open_checkpoint(stats, len(state.adapters) + 1)
        steps = load(MERGES["compensated"])(state, steps, statistics)
    if own := base.own("merged files"):
        shards, files, more = own(state, list(_all_steps(steps)), file, imatrix)
        plan = _plan_of_files(state, steps, statistics, shards, files)
        return replace(plan, options=plan.options | more, is_file=len(shards) == 1)
    return _plan(state, steps, statistics, file)


def open_merge(
    base: Base,
    sources: list[tuple[Folder, float]],
    options: MergeOptions,
    weight_of: "WeightOf | None" = None,
    weights: "WeightsFile | None" = None,
    selection: "Selection | None" = None,
) -> tuple[MergeState, list[AdapterkitError]]:
    """The state of a merge before its parameters are matched, and the problems found so far."""
    if not sources:
        raise Refused(
            "no adapter",
            expected="one or more",
            hint="name the adapters after the base",
            code="AK102",
        )
    sources, with_initial = _with_initial(sources, options)
    if with_initial and weights is not None and not weights.modules:
        weights = None  # the adapters have the same ones
    if with_initial and (options.weight_for or options.lbw or weights):
        raise Refused(
            "weights of modules of an adapter that goes with initial factors",
            expected="one weight",
            where="options",
            hint=WITHOUT_INITIAL,
            code="AK102",
        )
    adapters, errors = _scan_adapters(sources)
    given = [weight for _, weight in sources]
    is_enough = lambda it: (
        len(adapters) == len(given)
        and all(one.is_factors_alone for one in adapters)
        and not MergeState(it, adapters, given, options).names.needs_model
    )
    try:
        checkpoint = base.read_for(is_enough)
    except AdapterkitError as error:
        Problems([error, *errors]).raise_all()
        raise
    if errors and len(adapters) < len(sources):
        Problems(errors).raise_all()
    more = (base.part, weight_of, weights, selection)
    state = MergeState(checkpoint, adapters, given, options, *more)
    if selection is None and state.selection is not None:
        errors += state.selection.refusals("a module of the adapters")
    if weights is not None:
        state.notes += weights.notes_on_base(state.fingerprint, state.original.name)
    state.with_initial = with_initial
    if options.dequantize:
        _decode_to_16_bits(state)
    whole = base.parts_of or base.folder
    state.merged_before = merged_adapters(whole)
    if state.merged_before or len(adapters) > 1:
        state.notes += history_notes(whole, state.merged_before, adapters, state.weights)
    if own := base.own("prepare merge"):  # before parameters are matched
        own(state, errors)
    return state, errors


def _decode_to_16_bits(state: MergeState) -> None:
    """Write decoded weights in 16 bits unless `dtype` says otherwise, because their quantization
    error is larger than that rounding."""
    wide = any(weight.dtype == "F32" for weight in state.quantized)
    if state.options.dtype is None and wide:
        declared = set(map(str, nested_values(state.base.config, "dtype"))) & {
            "float16",
            "bfloat16",
        }
        dtype = "fp16" if declared == {"float16"} else "bf16"
        state.options = replace(state.options, dtype=dtype)
        state.notes.append(f"--dequantize: written in {dtype}; --dtype fp32 keeps 32 bits")


def changed_steps(state: MergeState, errors: Sequence[AdapterkitError] = ()) -> Steps:
    """The steps of all output files; raises `Refused` with these errors and those of the steps."""
    collect_changes(state)
    Problems([*errors, *state.errors]).raise_all()
    brought = {*state.new, *(name for name, change in state.changes.items() if change.value)}
    if state.original.in_safetensors:  # other containers keep all their tensors
        state.errors += check_gaps(state.base, state.names.model, state.notes, brought)
    resolve_tied_weights(state)
    if brought:
        resolve_vocab_resize(state)
        resolve_new_head(state)
    state.errors.raise_all()
    steps = plan_steps(state)
    state.errors += state.methods.problems() if state.methods else []
    state.errors.raise_all()
    has_changes = any(step.edits or step.source.folder for step in _all_steps(steps))
    if not has_changes and not (state.part and state.skipped):  # other components may have changes
        raise _nothing_changed(state)
    if state.original.in_safetensors and (state.quantized or state.options.dequantize):
        check_quantized_output(state, steps)
    state.errors.raise_all()
    return steps


def _with_initial(
    sources: list[tuple[Folder, float]], options: MergeOptions
) -> tuple[list[tuple[Folder, float]], frozenset[int]]:
    """The adapters, each followed by its initial factors, if any, with the opposite weight; and the
    numbers of the adapters that have such."""
    expanded: list[tuple[Folder, float]] = []
    numbers: set[int] = set()
    for folder, weight in sources:
        expanded.append((folder, weight))
        initial = None if options.base_is_residual else initial_of(folder)
        if initial is not None:
            numbers.add(len(expanded))
            expanded.append((initial, -weight))
    return expanded, frozenset(numbers)


def _scan_adapters(
    sources: list[tuple[Folder, float]],
) -> tuple[list[Adapter], list[AdapterkitError]]:
    """The readable content of each adapter, to compare with the base, and all problems found."""
    adapters: list[Adapter] = []
    errors = Problems()
    for number, (folder, _) in enumerate(sources, start=1):
        adapter, scan, is_typed = scan_adapter(folder, number)
        is_other = scan.config.get("peft_type", "LORA") != "LORA"
        if is_other or ADDED_DELTAS in folder.files():
            with errors.collected():
                adapter, scan, is_typed = load(ADAPTERS["others"])(adapter, scan, is_typed)
        errors += scan.errors
        if is_typed and scan.shards:
            adapters.append(adapter)
    return adapters, errors


def _lost_shards(adapter: Adapter) -> list[str]:
    """The warning of factors that lack a process's shard. A long run of zeros in a few b loads the
    code that checks all; files on the Hub are not read while planning."""
    some = {lora.module.rpartition(".")[2]: lora.b for lora in adapter.loras}
    with suppress(Damaged):  # the job itself reports files that end too early
        for spec, data in read_small(adapter.folder, [*some.values()][:8], most=0):
            if any(data) and bytes(spec.nbytes // 8) in bytes(data):
                return load(ADAPTERS["lost shards"])(adapter)
    return []


def plan_merge_into_original(
    base: StrPath,
    unquantized: StrPath,
    sources: list[tuple[Folder, float]],
    options: MergeOptions,
    stats: Folder | None = None,
    chosen: "WeightsFile | None" = None,
) -> Plan:
    """The plan of a merge into `unquantized`, the 16-bit original of the quantized base that the
    adapters were trained on; `Refused` if it is not that original."""
    from adapterkit.core.outputs.changed_base import changes_of

    quantized, original = (open_checkpoint(open_model(one)) for one in (base, unquantized))
    errors = Problems(where=quantized.name, code="AK408")
    weights = quantized_weights(decoded_view(quantized).tensors)
    if not weights:
        errors.add("no quantized weights", "a quantized base", "remove --original")
    for change in changes_of(quantized):
        by = change.partition("-")[0]
        errors.add(
            f"a base made by {by}: its adapter corrects changes that the original lacks",
            "a quantized copy of the original",
            "merge into the base itself",
        )
    check_not_quantized(original)
    for weight in weights:
        spec = original.tensors.get(weight.key)
        if spec is None or spec.shape != weight.shape:
            there = spec.shape if spec else "none"
            problem = f"{shown(weight.key)} {weight.shape}, {there} in {original.name}"
            hint = "give the model that the base was quantized from"
            errors.add(problem, "the same weights", hint)
    errors.raise_all()
    plan = plan_merge(kind_of(original.folder), sources, options, stats, weights=chosen)
    note = f"merged into {original.name}; the adapters were trained on {quantized.name}"
    return replace(plan, notes=(*plan.notes, note))


def check_quantized_output(state: MergeState, steps: Steps) -> None:
    """Refuse changes that a quantized base's format or its decoding does not allow. Keep the format
    in the config if the weights keep theirs."""
    weights, options = state.quantized, state.options
    if not weights:
        state.notes.append("--dequantize has no effect: the base is not quantized")
        return
    errors, first = Problems(where=state.original.name, code="AK404"), "dequantize the base first"
    if any(spec.key != key for key, spec in state.base.tensors.items()):
        errors.add("layer_replication on a quantized base", "a base of 16 or 32 bits", first)
    if any(step.source.dtype == "F64" and step.edits for step in _all_steps(steps)):
        errors.add("edits of F64 weights next to quantized ones", "F32, F16 or BF16", first)
    if options.dequantize and (own := known_slots(state.base)) and not known_slots(state.original):
        state.notes.append(load(MERGES["own layout"])(state.original.name, own))
    if not options.dequantize:
        edited = []
        for step in _all_steps(steps):
            if isinstance(step.source, QuantizedWeight):
                edited += [step.source] if step.edits else []
            elif isinstance(state.base.tensors.get(step.key), QuantizedWeight):
                problem = f"{shown(step.key)} is quantized, and an adapter trained it fully"
                errors.add(problem, "factors on quantized weights", "give --dequantize")
        transposed = [weight for weight in weights if getattr(weight, "transposed_scales", False)]
        errors += check_writable([*edited, *transposed], state.original.name)
        for name in ("dtype", "compat", "max_shard_size"):
            if getattr(options, name):
                problem = f"{flag_of(name)} with a quantized base"
                errors.add(problem, "the format as it is", "give --dequantize", where="options")
        state.config |= {k: v for k, v in state.original.config.items() if k in CONFIG_KEYS}
    state.errors += errors


def _all_steps(steps: Steps) -> Iterator[Step]:
    return (step for group in steps.values() for step in group)


def _nothing_changed(state: MergeState) -> Refused:
    """The refusal of a merge that would leave the base unchanged."""
    names = [adapter.name for adapter in state.adapters]
    if state.skipped:
        return nothing_selected(names, state.options)
    return Refused(
        "an adapter without weights",
        expected="at least one module",
        where=", ".join(names),
        hint="check the adapter",
        code="AK105",
    )


def _plan(state: MergeState, steps: Steps, stats: Checkpoint | None, file: str | None) -> Plan:
    """The plan of a merge into safetensors; `file`: the name of a single-file output."""
    if file is not None:
        steps = {file: list(_all_steps(steps))}
        return replace(_plan_of_files(state, steps, stats, _shards(state, steps), {}), is_file=True)
    shards = _shards(state, steps)
    if state.options.dtype:
        name = dtypes.CONFIG_NAME[dtypes.parse(state.options.dtype)]
        for key in ("dtype", "torch_dtype"):
            set_nested(state.config, key, name)
    tokenizer = tokenizer_files(state.adapters, state.options.tokenizer, state.notes)
    merged = zip(state.adapters, state.weights, strict=True)
    rows = [
        Merged(one.folder, w, len(one.loras) + len(one.others), one.config.get("r", ""))
        for one, w in merged
    ]
    how = {}
    if state.options.method is not None:
        how = {"delta": load(MERGES["words"])(state.options)}
    card = merged_card(state.original.folder, rows, **how)
    omit = quantization_files(state.base.tensors) if state.options.dequantize else ()
    files = model_files(state.original, state.config, shards, card, tokenizer=tokenizer, omit=omit)
    return _plan_of_files(state, steps, stats, shards, files)


def _plan_of_files(
    state: MergeState,
    steps: Steps,
    stats: Checkpoint | None,
    shards: tuple[OutputFile, ...],
    files: Files,
) -> Plan:
    inputs = [state.original, *state.adapters, *([stats] if stats else [])]
    decisions = {
        "adapters": [
            {
                "name": adapter.name,
                "weight": weight,
                "modules": len(adapter.loras) + len(adapter.others),
            }
            for adapter, weight in zip(state.adapters, state.weights, strict=True)
        ],
        "left_out": state.skipped,
        "tensors_changed": sum(step.edits != () for step in _all_steps(steps)),
    }
    if state.merged_before:
        decisions["held"] = [adapter._asdict() for adapter in state.merged_before]
    options = {k: v for k, v in vars(state.options).items() if v not in (None, False, ())}
    options["weights"] = state.weights
    if state.file is not None:
        options |= state.file.in_receipt()
    return plan_of(
        "merge",
        options,
        inputs,
        configs=(0,),
        shards=shards,
        files=files,
        decisions=decisions,
        notes=state.notes,
        warn=partial(
            rounding_warnings,
            compat=state.options.compat,
            in_gguf=not state.original.in_safetensors,
        ),
    )


def _shards(state: MergeState, steps: Steps) -> tuple[OutputFile, ...]:
    limit, headers = state.options.max_shard_size, state.headers
    if len(steps) == len(headers) == 1:  # the output's file may have another name
        headers = dict(zip(steps, headers.values(), strict=True))
    limit = parse_size(limit) if limit else None
    if state.quantized:
        if state.options.dequantize and limit:
            return plan_shards_of_size(list(_all_steps(steps)), limit, stem_of(headers))
        return tuple(
            plan_shard(name, group, headers[name], keep_format=not state.options.dequantize)
            for name, group in steps.items()
        )
    by_key = {step.key: step for step in _all_steps(steps)}
    if limit:
        stored = [step.planned for step in _all_steps(steps)]
        metadata = next(iter(headers.values())).metadata or {"format": "pt"}
        layouts = dict.fromkeys(
            layout.resharded(stored, limit, metadata, stem_of(headers)), metadata
        )
    else:
        layouts = {
            layout.like_base(name, [step.planned for step in group], headers[name]): (
                headers[name].metadata or {"format": "pt"}
            )
            for name, group in steps.items()
        }
    return tuple(
        plan_laid_out(one, [by_key[tensor.key] for tensor in one.tensors], metadata)
        for one, metadata in layouts.items()
    )

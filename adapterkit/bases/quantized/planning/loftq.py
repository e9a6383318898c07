"""loftq: quantize a base and compute the adapter that compensates the loss (LoftQ,
arXiv:2310.08659)."""

from collections.abc import Collection
from dataclasses import replace
from functools import partial

from adapterkit.bases.quantized.loftq import LoftQFactors, LoftQWeight, finalize_accepted
from adapterkit.bases.quantized.planning.weights import plan_quantization
from adapterkit.bases.quantized.records.loftq import Loftq
from adapterkit.core import dtypes
from adapterkit.core.adapter.factors import Place
from adapterkit.core.adapter.targets import Patterns
from adapterkit.core.adapter.unmatched import unmatched
from adapterkit.core.checkpoint.fingerprint import fingerprint
from adapterkit.core.checkpoint.spec import Checkpoint, open_checkpoint
from adapterkit.core.errors import WARNING, Problems, Refused, shown
from adapterkit.core.inputs.input_identity import plan_of
from adapterkit.core.inputs.sources import if_given, open_model, open_statistics
from adapterkit.core.options import integer_of
from adapterkit.core.outputs import changed_base
from adapterkit.core.outputs.model import QuantizedModel
from adapterkit.core.patterns import pattern_table, read_rules
from adapterkit.core.plan import OutputFile, Plan
from adapterkit.core.records import Json
from adapterkit.core.tasks.handoff import HandoffFactors
from adapterkit.core.weights.codec import QuantizedWeight
from adapterkit.core.weights.decoded import decoded_view
from adapterkit.core.weights.detect import check_not_quantized
from adapterkit.core.weights.names import Names
from adapterkit.verbs.shared import adapter_output
from adapterkit.verbs.shared.options import BlockOptions
from adapterkit.verbs.shared.statistics_file import select_covariances
from adapterkit.verbs.shared.targets import select_layers

BITS = {4: "nf4", 8: "int8"}
BITS_FOR, NOT_QUANTIZED = "--bits-for", "not quantized"
MIXED = {4: "w4a16", 8: "w8a16"}  # bitsandbytes knows one width for a model
SUMMARY = "LoftQ: for its quantized base alone, not for the original"

OF_FACTORS = ("alpha", "rslora", "dtype")  # options that leave the base as it is


def plan_loftq(options: Loftq) -> Plan:
    """Plan LoftQ, or raise `Refused`."""
    quantized = if_given(open_model, options.quantized_base)
    stats = if_given(open_statistics, options.stats)
    base = open_checkpoint(open_model(options.base))
    check_not_quantized(base)
    given = (folder for folder in (quantized, stats) if folder is not None)
    others = [open_checkpoint(folder, number) for number, folder in enumerate(given, 1)]
    statistics = others[-1] if stats is not None else None
    if quantized is not None:
        notes: list[str] = []
        output = _plan_fixed_base(base, others[0], statistics, options, notes)
        decisions: Json = {"modules": len(output.tasks)}
        if options.accept is not None:
            output = replace(output, finalize=partial(finalize_accepted, options.accept))
        shards, files = (output.shard(),), output.files(notes)
    else:
        shards, files, notes, decisions = _plan_base_and_adapter(base, statistics, options)
    return plan_of(
        "loftq",
        options.recipe_options(),
        [base, *others],
        configs=(0,),
        shards=shards,
        files=files,
        decisions=decisions,
        notes=notes,
        warn=_warnings,
    )


def _plan_base_and_adapter(
    base: Checkpoint, stats: Checkpoint | None, options: Loftq
) -> tuple[tuple[OutputFile, ...], Json, list[str], Json]:
    """The files of the packed base and of its adapter: computed ones, others, notes, and
    metrics."""
    rules = read_rules(BITS_FOR, options.bits_for, integer_of(*MIXED))
    to = (MIXED if options.bits_for else BITS)[options.bits]
    formats = {pattern: MIXED[bits] for pattern, bits in pattern_table(rules).items()}
    exceptions = Patterns(formats, BITS_FOR)
    blocks = vars(options.only(BlockOptions))
    quantization = plan_quantization(base, {"to": to, **blocks}, exceptions)
    quantized = list(quantization.modules)
    Problems(
        unmatched(BITS_FOR, pattern, quantized, "a quantized module")
        for pattern in exceptions.unmatched(quantized)
    ).raise_all()
    plain, notes = quantization.weights, quantization.notes
    keys = {name: weight.key for name, weight in quantization.modules.items()}
    linear = [name for name, key in keys.items() if key in plain]
    chosen = select_layers(quantization.names, options.targets, linear, NOT_QUANTIZED, notes)
    modules = {name: plain[keys[name]] for name in linear if name in chosen}
    selected = select_covariances(stats, {name: w.shape[1] for name, w in modules.items()})
    tasks, factors = quantization.upcast_to_fp32(), []
    how = options.rank, options.scale, options.iterations
    for name, weight in modules.items():
        key, turned = weight.key, weight.transposed
        stored = base.tensors[key], quantization.quantized[key]
        tasks[key] = LoftQWeight(key, *stored, name, *how, turned, selected.get(name))
        place = Place.of_weight(name, weight.shape)
        factors.append(HandoffFactors(name, place, dtypes.parse(options.dtype), options.rank))
    config = quantization.config()
    of_base = {k: v for k, v in options.recipe_options().items() if k not in OF_FACTORS}
    change = changed_base.change_by("loftq", [base, stats], of_base)
    mark = {changed_base.CHANGED_BY: change}
    model = QuantizedModel(base, quantization.quantized, tasks, config, "base", mark)
    shards = model.shards()
    made_for = changed_base.planned_fingerprint(shards)
    adapter = adapter_output.new_adapter(base, factors, options, SUMMARY, "adapter", made_for)
    marked = changed_base.marked(adapter.settings, adapter.base_settings, change)
    adapter = replace(adapter, **marked)
    names = " and ".join(dict.fromkeys((to, *exceptions.values)))
    files = model.files(f"quantized to {names} by LoftQ: use it with the adapter next to it")
    files |= adapter.files(notes)
    decisions = {
        "left_out": sorted(quantization.skipped),
        "quantized": len(quantization.quantized),
        "modules": len(factors),
    }
    return (*shards, adapter.shard()), files, notes, decisions


def _modules(names: Names, packed: Collection[str]) -> dict[str, str]:
    """The modules of the loaded model whose weights are stored under these keys."""
    known = {} if names.model is None else names.model.parameters
    module_of = {
        p.slots[0].key: name for name, p in known.items() if len(p.slots) == 1 and not p.is_alias
    }
    return {key: module_of.get(key, key).removesuffix(".weight") for key in packed}


def _plan_fixed_base(
    base: Checkpoint,
    quantized: Checkpoint,
    stats: Checkpoint | None,
    options: Loftq,
    notes: list[str],
) -> adapter_output.Output:
    """The adapter alone, for a quantized base that stays as it is."""
    plain = decoded_view(quantized)
    names = Names(plain, build_model=True)
    errors = Problems(where=quantized.name, code="AK408")
    factors: list[LoftQFactors] = []
    packed = {key: spec for key, spec in plain.tensors.items() if isinstance(spec, QuantizedWeight)}
    modules = _modules(names, packed)
    chosen = select_layers(names, options.targets, modules.values(), NOT_QUANTIZED, notes)
    for key, name in ((key, name) for key, name in modules.items() if name in chosen):
        spec, original = packed[key], base.tensors.get(key)
        if original is None or original.shape != spec.shape or original.dtype not in dtypes.FLOATS:
            there = original.shape if original else "nothing"
            errors.add(
                f"{shown(key)}: {spec.shape} quantized, {there} in {base.name}",
                "the same weights",
                "give the original that it was quantized from",
            )
            continue
        turned = names.transposed(name)
        place = Place.of_weight(name, spec.shape[::-1] if turned else spec.shape)
        factors.append(
            LoftQFactors(
                name,
                place,
                dtypes.parse(options.dtype),
                rank=options.rank,
                original=original,
                packed=spec,
                scale=options.scale,
                transposed=turned,
            )
        )
    errors.raise_all()
    if not factors:
        raise Refused(
            "no quantized weights to compensate",
            expected="one or more",
            where=quantized.name,
            hint="check --targets",
            code="AK408",
        )
    selected = select_covariances(stats, {task.name: task.place.a_tail[0] for task in factors})
    factors = [replace(task, covariance=selected.get(task.name)) for task in factors]
    made_for = fingerprint(quantized)
    return adapter_output.new_adapter(base, factors, options, SUMMARY, "", made_for)


def _warnings(metrics: dict[str, dict]) -> list[str]:
    """Warnings for modules that factors did not improve."""
    worse = sorted(
        key
        for key, metric in metrics.items()
        if metric.get("accepted", True)
        and metric.get("error_after", 0) >= metric.get("error", 0) > 0
    )
    if not worse:
        return []
    return [
        f"{WARNING}no round of {len(worse)} modules was better than plain quantization, e.g. "
        f"{', '.join(worse[:3])}"
    ]

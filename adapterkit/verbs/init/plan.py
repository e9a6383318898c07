"""init: create an adapter by any method, and for some methods the residual base without the
adapter's component."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from adapterkit.bases.quantized.planning.weights import QuantizationPlan, plan_quantization
from adapterkit.core import dtypes
from adapterkit.core.adapter import adapter_config
from adapterkit.core.adapter.keys import INITIAL
from adapterkit.core.adapter.record import Adapter, Lora
from adapterkit.core.checkpoint.fingerprint import fingerprint
from adapterkit.core.checkpoint.overlay import Overlay
from adapterkit.core.checkpoint.spec import Checkpoint, open_checkpoint
from adapterkit.core.commands import command
from adapterkit.core.errors import Problems, Refused, as_usage, shown
from adapterkit.core.inputs.input_identity import plan_of
from adapterkit.core.inputs.sources import if_given, open_model, open_statistics
from adapterkit.core.merge.job import MergeState
from adapterkit.core.merge.plan import changed_steps
from adapterkit.core.merge.verb import MergeOptions
from adapterkit.core.outputs import changed_base
from adapterkit.core.outputs.cards import model_card
from adapterkit.core.outputs.folder_files import model_files
from adapterkit.core.outputs.model import QuantizedModel, plan_shard
from adapterkit.core.plan import Files, OutputFile, Plan, Task, no_warnings
from adapterkit.core.records import Json
from adapterkit.core.tasks.handoff import HandoffFactors, handed_on
from adapterkit.core.weights.decoded import decoded_view
from adapterkit.core.weights.detect import check_not_quantized
from adapterkit.verbs.init.methods import created_init
from adapterkit.verbs.init.methods.protocol import ComputedInit, Initialization, RedistributingInit
from adapterkit.verbs.init.records import Init
from adapterkit.verbs.init.targets import InitialTarget, find_targets
from adapterkit.verbs.init.tasks import (
    InitialFactors,
    ResidualWeight,
    redistribute,
    warn_of_dropped,
    with_candidates,
)
from adapterkit.verbs.shared import adapter_output
from adapterkit.verbs.shared.options import BlockOptions
from adapterkit.verbs.shared.statistics_file import INPUTS, select_statistics, shape_of

BASE = "base"  # its folder in the output
SUMMARY = "without the component that {} moved into the adapter"


def planned_adapter(config: bytes, targets: Sequence[InitialTarget], dtype: str) -> Adapter:
    """The adapter of these targets, whose factors are still to be made."""
    loras = []
    for target in targets:
        shapes = target.place.shapes(target.rank)
        a, b = handed_on(target.name, dtypes.parse(dtype), shapes)
        loras.append(Lora(target.path, target.factors_kind, a, b, depth=target.depth))
    folder = Overlay("adapter", "the initial adapter", {}, {})  # which the same plan writes
    return Adapter(folder, 1, json.loads(config), tuple(loras), {}, (), {})


def plan_residual(
    base: Checkpoint, adapter: Adapter, method: str, change: str, notes: list[str]
) -> tuple[tuple[OutputFile, ...], Files]:
    """The files of W - scale·b@a in the base's own dtypes and formats: shards, and the others.

    `Refused` if the factors cannot be subtracted from a stored weight."""
    state = MergeState(base, [adapter], [-1.0], MergeOptions())
    steps = changed_steps(state)
    notes += state.notes
    shards = []
    for name, group in steps.items():
        group = [replace(step, measures_error=bool(step.edits)) for step in group]
        header = base.shards[name]
        metadata = (header.metadata or {"format": "pt"}) | {changed_base.CHANGED_BY: change}
        header = replace(header, metadata=metadata, raw=b"")  # the base's has other metadata
        shards.append(plan_shard(f"{BASE}/{name}", group, header, keep_format=True))
    card = model_card(base.folder, SUMMARY.format(method))
    return tuple(shards), model_files(base, state.config, shards, card, folder=BASE)


def plan_quantized_residual(
    base: Checkpoint,
    quantization: QuantizationPlan,
    targets: Sequence[InitialTarget],
    method: str,
    change: str,
) -> tuple[tuple[OutputFile, ...], Files]:
    """The same files, quantized; weights without factors are quantized directly."""
    others = [target for target in targets if target.name not in quantization.linear]
    if others:
        raise Refused(
            f"--quantize with factors on {', '.join(target.name for target in others[:4])}",
            expected="linear layers with a weight of their own, that --skip does not leave out",
            where="--targets",
            hint="remove them from --targets, or remove --quantize",
            code="AK102",
        )
    tasks: Mapping[str, Any] = {
        (key := quantization.linear[target.name]): ResidualWeight(
            key,
            base.tensors[key],
            quantization.quantized.get(key),
            target.name,
            target.scale,
            quantization.weights[key].transposed,
        )
        for target in targets
    }
    mark, config = {changed_base.CHANGED_BY: change}, quantization.config()
    model = QuantizedModel(base, quantization.quantized, tasks, config, BASE, mark)
    return model.shards(), model.files(SUMMARY.format(method))


COLLECTED = INPUTS | {"gradient": ("gradient",)}  # name in `stats --what`: kinds
ADAPTER = "adapter"  # folder in the output


def plan_init(options: Init) -> Plan:
    """The plan of an initialization, or `Refused`."""
    folder = open_model(options.base)
    stats = if_given(open_statistics, options.stats)
    method = created_init(options.method, dict(options.settings or {}))
    as_usage()(_check)(options, method, stats is not None)
    notes: list[str] = []
    base = open_checkpoint(folder)
    if options.quantize:
        check_not_quantized(base, "remove --quantize: the rest keeps the base's format")
    statistics = None if stats is None else open_checkpoint(stats, 1)
    targets = find_targets(decoded_view(base), options, notes)
    _check_targets(base, method, targets)
    tasks = _factors(options, method, targets, statistics)
    decisions: Json = {"modules": len(targets)}
    implicit = method.changes_base and options.residual == "implicit"
    finalize, warn = None, no_warnings
    if isinstance(method, RedistributingInit):
        tasks = with_candidates(method, tasks)
        finalize = lambda tasks: partial(redistribute, method, tasks)
        warn = warn_of_dropped
    adapter = _adapter(base, tasks, targets, options, method, ADAPTER, implicit)
    adapter = replace(adapter, finalize=finalize)
    rest, base_files = (), {}
    if method.changes_base and not implicit:
        change = changed_base.change_by("init", [base, statistics], options.recipe_options())
        rest, base_files = _residual(base, targets, options, adapter, change, notes, decisions)
        marked = changed_base.marked(adapter.settings, adapter.base_settings, change)
        adapter = replace(adapter, **marked)
    files = base_files | adapter.files(notes)
    made_for = changed_base.planned_fingerprint(rest) if rest else fingerprint(base)
    shards = [replace(adapter, base_fingerprint=made_for).shard(), *rest]
    if implicit:
        initial = [
            HandoffFactors(f"{INITIAL} {t.name}", t.place, t.dtype, t.rank, t.name) for t in tasks
        ]
        copy = _adapter(base, initial, targets, options, method, f"{ADAPTER}/{INITIAL}")
        shards, files = [*shards, copy.shard()], files | copy.files(notes)
    return plan_of(
        "init",
        options.recipe_options(),
        [base, *([statistics] if statistics else [])],
        configs=(0,),
        shards=shards,
        files=files,
        decisions=decisions,
        notes=notes,
        warn=warn,
    )


def _factors(
    options: Init,
    method: Initialization,
    targets: Sequence[InitialTarget],
    statistics: Checkpoint | None,
) -> list[InitialFactors]:
    specs = {
        kind: select_statistics(
            statistics, kind, {target.name: shape_of(kind, *target.shape) for target in targets}
        )
        for kind in method.needs
        if kind != "weight"
    }
    return [
        InitialFactors(
            name=target.name,
            place=target.place,
            dtype=dtypes.parse(options.dtype),
            method=method,
            rank=target.rank,
            alpha=target.alpha,
            scale=target.scale,
            seed=options.seed,
            weight=target.weight if "weight" in method.needs else None,
            statistics=tuple((kind, modules[target.name]) for kind, modules in specs.items()),
            hands_on=method.changes_base,
        )
        for target in targets
    ]


def _residual(
    base: Checkpoint,
    targets: list[InitialTarget],
    options: Init,
    adapter: adapter_output.Output,
    change: str,
    notes: list[str],
    decisions: Json,
) -> tuple[tuple[OutputFile, ...], Files]:
    """The files of the residual base."""
    if options.quantize:
        quantization = plan_quantization(
            base, {"to": options.quantize, **vars(options.only(BlockOptions))}
        )
        notes += quantization.notes
        decisions["quantized"] = len(quantization.quantized)
        return plan_quantized_residual(base, quantization, targets, options.method, change)
    config = adapter.config({t.name: {"rank": t.rank, "alpha": t.alpha} for t in targets})
    planned = planned_adapter(config, targets, options.dtype)
    return plan_residual(base, planned, options.method, change, notes)


def _adapter(
    base: Checkpoint,
    tasks: Sequence[Task],
    targets: Sequence[InitialTarget],
    options: Init,
    method: Initialization,
    folder: str,
    implicit: bool = False,
) -> adapter_output.Output:
    """An adapter of the output; its config has no init that PEFT would repeat."""
    parameters = [target.name for target in targets if target.kind == "experts"]
    settings: Json = {}
    if parameters:
        settings |= {"target_parameters": parameters, "peft_version": adapter_config.PEFT_LAYOUT}
    if implicit:
        settings["init_lora_weights"] = f"implicit_{options.method}"
    where = (
        "for the original base"
        if implicit or not method.changes_base
        else ("for the base next to it, not for the original")
    )
    adapter = adapter_output.new_adapter(base, tasks, options, f"{options.method}: {where}", folder)
    return replace(
        adapter,
        modules={task.name: target.name for task, target in zip(tasks, targets, strict=True)},
        settings=adapter.settings | settings,
        alpha={target.name: target.alpha for target in targets},
        parameters=frozenset(parameters),
    )


def _check(options: Init, method: Initialization, has_stats: bool) -> None:
    """Refuse options that conflict."""
    errors = Problems(where="options", code="AK102")
    needs = [kind for kind in method.needs if kind != "weight"]
    if needs and not has_stats:
        what = ",".join(name for name, kinds in COLLECTED.items() if {*kinds} & {*needs})
        collect = {"data": "FILE", "what": what, "out": "stats.safetensors"}
        errors.add(
            f"--method {options.method} without --stats",
            f"statistics: {', '.join(needs)}",
            f"collect them\n{command('adapterkit stats', options.base, **collect)}",
        )
    if has_stats and not needs:
        errors.add(
            f"--stats with --method {options.method}", "a method that uses them", "remove --stats"
        )
    if options.quantize and (not method.changes_base or options.residual == "implicit"):
        errors.add(
            f"--quantize with --method {options.method} and no base to write",
            "a method that takes a part of each weight, and --residual write",
            "remove --quantize, or quantize the base",
        )
    errors.raise_all()


def _check_targets(
    base: Checkpoint, method: Initialization, targets: Sequence[InitialTarget]
) -> None:
    """Refuse layers on which a method is not defined, and ranks above those of the weights."""
    errors = Problems(code="AK105")
    for target in targets:
        if target.kind not in method.kinds:
            errors.add(
                f"{method.name} on {shown(target.name)}, of kind {target.kind}",
                " or ".join(method.kinds),
                "remove it from --targets (PEFT starts it in another way, silently)",
                where=base.name,
            )
        if not isinstance(method, ComputedInit):
            continue
        most = min(target.shape) // method.triplets_per_rank
        if target.rank > most:
            errors.add(
                f"rank {target.rank} for {shown(target.name)} {target.shape}",
                f"at most {most}",
                f"give --rank-for {target.name}={most}",
                where="--rank",
            )
    errors.raise_all()

"""Diffusers pipelines: each model is a base of its own, and the models' plans are joined."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from adapterkit.adapters.formats.engines import adapter_card
from adapterkit.bases.images.joined_plans import in_folders, joined
from adapterkit.bases.images.pipeline import read_pipeline
from adapterkit.bases.images.pipeline_adapters import Split, base_of_conversion, split_adapters
from adapterkit.core.adapter import adapter_config
from adapterkit.core.adapter.selection import Selection
from adapterkit.core.adapter.targets import TargetMatcher, entries_in
from adapterkit.core.checkpoint.folder import Folder
from adapterkit.core.checkpoint.reader import have_same_bytes
from adapterkit.core.checkpoint.shards import weight_files
from adapterkit.core.checkpoint.spec import Checkpoint, open_checkpoint
from adapterkit.core.errors import Problems, Refused, shown
from adapterkit.core.inputs.base_door import Base
from adapterkit.core.inputs.weights_file import WeightsFile, weighted_sources
from adapterkit.core.merge.job import nothing_selected
from adapterkit.core.merge.verb import Merge, MergeOptions
from adapterkit.core.options import Sources, StrPath, flag_of
from adapterkit.core.outputs.cards import Merged, merged_card, model_card
from adapterkit.core.outputs.model import rounding_warnings
from adapterkit.core.plan import Plan
from adapterkit.core.weights.detect import quantization_evidence

if TYPE_CHECKING:
    from adapterkit.bases.quantized.records.dequantize import Dequantize
    from adapterkit.bases.quantized.records.quantize import Quantize
    from adapterkit.verbs.combine.records.extract import Extract

# options of models alone, and sources
OPTIONS = ("tokenizer", "changed_type", "gguf_scales", "modelfile")
SOURCES = ("original", "stats", "imatrix", "density_for")


@dataclass(frozen=True)
class PipelineBase(Base):
    """A folder of models, which model_index.json names."""

    noun = "pipeline"
    does: ClassVar = {
        work: f"bases.images.pipeline_base:{function}"
        for work, function in {
            "merge": "plan_pipeline_merge",
            "open adapters": "opened_adapters",
            "merge of folders": "plan_merge_into_parts",
            "extract": "plan_pipeline_extraction",
            "quantize": "plan_pipeline_quantization",
            "dequantize": "plan_pipeline_dequantization",
            "base of a conversion": "part_of_conversion",
            "adapters on models": "adapters_on_parts",
        }.items()
    } | {
        "inspect": "verbs.look.pipelines:inspect_pipeline",
        "diff": "verbs.look.pipelines:match_pipelines",
    }


# ---- adapters ----------------------------------------------------------------------------------


def opened_adapters(base: Base, adapters: Sources, variant: str | None = None) -> Split:
    """The adapters by the pipeline's components, with their weights."""
    return split_adapters(adapters, read_pipeline(base.folder, variant))


def part_of_conversion(base: Base, source: Folder, component: str | None) -> Checkpoint:
    return base_of_conversion(source, read_pipeline(base.folder), component)


def adapters_on_parts(base: Base, adapter: StrPath) -> Iterator[tuple[Folder, Checkpoint]]:
    """The adapter of each component, and that component."""
    pipeline = read_pipeline(base.folder)
    ((parts, _),) = split_adapters([(adapter, 1.0)], pipeline)
    yield from ((own, pipeline.part(name).as_base) for name, own in parts.items())


# ---- merge -------------------------------------------------------------------------------------


def plan_pipeline_merge(base: Base, merge: Merge, options: MergeOptions) -> Plan:
    """The plan of a merge with its options; `Refused` for sources that pipelines do not support."""
    errors = Problems(
        where="options", hint="merge into one part: the folder of a model", code="AK102"
    )
    for name in SOURCES:
        if getattr(merge, name) not in (None, ()):
            hint = "give ORIGINAL as the base" if name == "original" else errors.hint
            errors.add(f"{flag_of(name)} with a pipeline", "a base that is one model", hint)
    errors.raise_all()
    pipeline = read_pipeline(base.folder, options.variant)
    sources, weights = weighted_sources(merge.adapters, merge.weights)
    split = split_adapters(sources, pipeline)
    return plan_merge_into_parts(base, split, options, weights=weights)


def plan_merge_into_parts(
    base: Base,
    adapters: Split,
    options: MergeOptions,
    *_: object,
    weights: WeightsFile | None = None,
    **__: object,
) -> Plan:
    """The plan of a merge into a pipeline, by component; a weights file prefixes modules with their
    component's name. `Refused` or `Damaged` with all problems of all components."""
    from adapterkit.core.merge.plan import plan_merge
    from adapterkit.verbs.combine.module_methods import ModuleWeights, added_by

    pipeline = read_pipeline(base.folder, options.variant)
    errors = Problems(
        where="options", hint="merge into one part: the folder of a model", code="AK102"
    )
    wrong = [flag_of(name) for name in OPTIONS if getattr(options, name)]
    wrong += ["--rounding compensated"] * (options.rounding == "compensated")
    for option in wrong:
        errors.add(f"{option} with a pipeline", "a base that is one model")
    if not adapters:
        errors.add("no adapter", "one or more", "name the adapters after the base")
    errors.raise_all()
    plans: dict[str, Plan] = {}
    given = [weight for _, weight in adapters]
    selection = Selection(options.include, options.exclude, has_components=True)
    rules = None
    if options.weight_for or options.lbw or weights is not None:
        rules = ModuleWeights(pipeline, given, options, weights)
    for name, part in pipeline.parts.items():
        numbers = [number for number, (parts, _) in enumerate(adapters, 1) if name in parts]
        own = [(adapters[number - 1][0][name], given[number - 1]) for number in numbers]
        if own:
            weight_of = rules and rules.of_part(name, numbers)
            with errors.collected(), part.named():
                model = Base(part.folder, part.name, part.pipeline)
                more = {"weight_of": weight_of, "selection": selection}
                plans[name] = plan_merge(model, own, options, **more)
    if not errors:
        errors += selection.refusals("a module of the adapters")
    if rules is not None and not errors:
        left_out = (text for plan in plans.values() for text in plan.decisions["left_out"])
        rules.rules.skipped |= {text.partition(": ")[2] for text in left_out}
        errors += rules.problems()
    errors.raise_all()
    decisions = _decisions(plans)
    if not decisions["tensors_changed"]:
        names = [one["name"] for one in decisions["adapters"]]
        raise nothing_selected(names, options)
    card = merged_card(pipeline.folder, _rows(plans), "diffusers", added_by(options))
    plan = joined(pipeline, plans, card)
    receipt = plan.options | {"weights": given} | (weights.in_receipt() if weights else {})
    plan = replace(plan, notes=(*plan.notes, *(rules.notes() if rules else ())))
    others = [name for name in pipeline.parts if name not in plans]
    for name in ("dtype", "max_shard_size") if others else ():
        if getattr(options, name):
            note = f"{flag_of(name)} does not apply to unchanged components: {', '.join(others)}"
            plan = replace(plan, notes=(*plan.notes, note))
    warn = partial(rounding_warnings, compat=options.compat)
    return replace(plan, options=receipt, decisions=decisions, warn=warn)


def _decisions(plans: Mapping[str, Plan]) -> dict[str, Any]:
    own = [plan.decisions for plan in plans.values()]
    adapters = [
        {**adapter, "part": name}
        for name, plan in plans.items()
        for adapter in plan.decisions["adapters"]
    ]
    decisions = {
        "adapters": adapters,
        "left_out": [text for each in own for text in each["left_out"]],
        "tensors_changed": sum(each["tensors_changed"] for each in own),
    }
    return decisions | {key: each[key] for each in own for key in ("held",) if key in each}


def _rows(plans: Mapping[str, Plan]) -> list[Merged]:
    return [
        Merged(folder, adapter["weight"], adapter["modules"], part=name)
        for name, plan in plans.items()
        for folder, adapter in zip(plan.folders[1:], plan.decisions["adapters"], strict=True)
    ]


# ---- other verbs -------------------------------------------------------------------------------


def plan_pipeline_quantization(base: Base, options: "Quantize") -> Plan:
    """The quantization of a pipeline's denoisers and text encoders, except modules that `--skip`
    matches; `Refused` with all problems of all components."""
    from adapterkit.bases.quantized.planning.quantize import check_fit, plan_model_quantization

    pipeline = read_pipeline(base.folder)
    errors = Problems(
        where="options", hint="quantize one part: the folder of a model", code="AK102"
    )
    for name in ("stats", "imatrix", "modelfile"):
        if getattr(options, name):
            errors.add(f"{flag_of(name)} with a pipeline", "a base that is one model")
    with errors.collected():
        check_fit(options)
    errors.raise_all()
    skips = TargetMatcher(entries_in(options.skip) if options.skip else (), "--skip")
    asked: list[str] = []  # names that may be skipped
    plans: dict[str, Plan] = {}

    def is_skipped(name: str) -> bool:
        asked.append(name)
        return skips(name)

    for name, part in pipeline.parts.items():
        if (part.is_denoiser or part.is_text_encoder) and not is_skipped(name):
            of_part = lambda module, name=name: is_skipped(f"{name}.{module}")
            with errors.collected(), part.named():
                checkpoint = open_checkpoint(part.folder)
                plans[name] = plan_model_quantization(checkpoint, options, of_part)
    errors += skips.refusals(asked)
    errors.raise_all()
    if not plans:
        raise pipeline.unknown("no part to quantize: no denoiser and no text encoder")
    card = model_card(pipeline.folder, f"quantized to {options.to}", "quantized", "diffusers")
    own = [plan.decisions for plan in plans.values()]
    left_out = [f"{part}.{n}" for part, p in plans.items() for n in p.decisions["left_out"]]
    decisions = {"left_out": left_out, "quantized": sum(each["quantized"] for each in own)}
    return replace(joined(pipeline, plans, card), decisions=decisions)


def plan_pipeline_dequantization(base: Base, options: "Dequantize") -> Plan:
    """The dequantization of all quantized components of a pipeline."""
    from adapterkit.bases.quantized.planning.dequantize import (
        nothing_quantized,
        plan_model_dequantization,
    )

    pipeline, errors = read_pipeline(base.folder), Problems()
    plans: dict[str, Plan] = {}
    for name, part in pipeline.parts.items():
        with errors.collected(), part.named():
            own = open_checkpoint(part.folder) if weight_files(part.folder) else None
            if own is not None and quantization_evidence(own.config, own.tensors) is not None:
                plans[name] = plan_model_dequantization(own, options)
    errors.raise_all()
    if not plans:
        raise nothing_quantized(pipeline.folder)
    card = model_card(pipeline.folder, "decoded to floats", library="diffusers")
    count = sum(plan.decisions["dequantized"] for plan in plans.values())
    return replace(joined(pipeline, plans, card), decisions={"dequantized": count})


def plan_pipeline_extraction(base: Base, tuned: Base, options: "Extract") -> Plan:
    """The extraction between two pipelines: a folder in PEFT's layout for each component that
    differs. Reads components with equal headers to compare them."""
    from adapterkit.verbs.combine.planning.extract import plan_model_extraction

    old, new = read_pipeline(base.folder), read_pipeline(tuned.folder)
    errors = Problems(
        where="options", hint="extract it between the folders of one part", code="AK102"
    )
    for name in ("max_size", "stats"):
        if getattr(options, name) is not None:
            errors.add(f"{flag_of(name)} with pipelines", "--rank or --energy alone")
    for name in old.parts.keys() ^ new.parts.keys():
        errors.add(f"{shown(name)} is a part of one of them alone", "pipelines of one kind")
    errors.raise_all()
    plans: dict[str, Plan] = {}
    notes: dict[str, list[str]] = {}
    selects = Selection(options.include, options.exclude, has_components=True)
    for name, part in old.parts.items():
        with errors.collected(), part.named():
            one = open_checkpoint(part.folder)
            other = open_checkpoint(new.parts[name].folder, 1)
            modules = {f"{name}.{key.rpartition('.')[0]}" for key in other.tensors}
            selects.known |= modules
            if not any(map(selects, modules)):
                notes.setdefault("not selected", []).append(name)
            elif have_same_bytes(one, other):
                notes.setdefault("the same in both", []).append(name)
            else:
                plans[name] = plan_model_extraction(one, other, options, name, selects)
    if not errors:
        errors += selects.refusals("a module of the pipelines")
    errors.raise_all()
    if not plans:
        raise Refused(
            "no selected part differs" if "not selected" in notes else "no part differs",
            expected="a fine-tune",
            where=f"{base.folder.label}, {tuned.folder.label}",
            hint="check the two paths",
            code="AK102",
        )
    summary = f"the difference of {tuned.folder.name} and {base.folder.name}"
    card = adapter_card(adapter_config.hub_id(base.folder), [], summary)
    plan = in_folders((old, new), plans, card)
    decisions = {
        key: [f"{part}.{name}" for part, own in plans.items() for name in own.decisions[key]]
        for key in ("left_out", "unchanged")
    }
    more = (f"{reason}: {', '.join(names)}" for reason, names in notes.items())
    return replace(plan, decisions=decisions, notes=(*plan.notes, *more))

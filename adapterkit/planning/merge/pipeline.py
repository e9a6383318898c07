"""merge into a pipeline of diffusers: each part that an adapter changes is a base of its own."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

from adapterkit.adapters.weights_file import WeightsFile, in_receipt
from adapterkit.checkpoint.folder import Folder
from adapterkit.errors import Problems
from adapterkit.options import flag_of
from adapterkit.plan import Plan
from adapterkit.planning.adapters.methods import added_by
from adapterkit.planning.inputs.pipeline import Pipeline, PipelinePart
from adapterkit.planning.inputs.pipeline_adapters import Split
from adapterkit.planning.merge.job import nothing_selected
from adapterkit.planning.merge.module_weights import ModuleWeights, WeightOf
from adapterkit.planning.outputs.cards import Merged, merged_card
from adapterkit.planning.outputs.model import rounding_warnings
from adapterkit.planning.pipelines import joined
from adapterkit.verbs.merge import MergeOptions

# of models alone
OPTIONS = ("tokenizer", "touched_as", "scales", "modelfile")
Weighted = list[tuple[Folder, float]]


def plan_pipeline_merge(
    pipeline: Pipeline,
    adapters: Split,
    options: MergeOptions,
    plan_part: Callable[[PipelinePart, Weighted, WeightOf | None], Plan],
    file: WeightsFile | None = None,
) -> Plan:
    """The plan of a merge into a pipeline; `Refused` or `Damaged` with all problems of all
    parts."""
    errors = Problems(where="options", hint="merge into one part: the folder of a model")
    wrong = [flag_of(name) for name in OPTIONS if getattr(options, name)]
    wrong += ["--rounding compensated"] * (options.rounding == "compensated")
    for option in wrong:
        errors.add(f"{option} with a pipeline", "a base that is one model")
    if not adapters:
        errors.add("no adapter", "one or more", "name the adapters after the base")
    errors.raise_all()
    plans: dict[str, Plan] = {}
    weights = [weight for _, weight in adapters]
    rules = None
    if options.weight_for or options.lbw or file is not None:
        rules = ModuleWeights(pipeline, weights, options, file)
    for name, part in pipeline.parts.items():
        numbers = [number for number, (parts, _) in enumerate(adapters, 1) if name in parts]
        own = [(adapters[number - 1][0][name], weights[number - 1]) for number in numbers]
        if own:
            with errors.collected(), part.named():
                plans[name] = plan_part(part, own, rules and rules.of_part(name, numbers))
    if rules is not None and not errors:
        left_out = (text for plan in plans.values() for text in plan.decisions["left_out"])
        rules.rules.skipped |= {text.partition(": ")[2] for text in left_out}
        errors += rules.problems()
    errors.raise_all()
    decisions = _decisions(plans)
    if not decisions["tensors_changed"]:
        names = [one["name"] for one in decisions["adapters"]]
        raise nothing_selected(decisions["left_out"], names, options)
    card = merged_card(pipeline.folder, _rows(plans), "diffusers", added_by(options))
    plan = joined(pipeline, plans, card)
    given = plan.options | {"weights": weights} | in_receipt(file)
    plan = replace(plan, notes=(*plan.notes, *(rules.notes() if rules else ())))
    others = [name for name in pipeline.parts if name not in plans]
    for name in ("dtype", "max_shard_size") if others else ():
        if getattr(options, name):
            note = f"{flag_of(name)}: not of parts that no adapter changes: {', '.join(others)}"
            plan = replace(plan, notes=(*plan.notes, note))
    warn = partial(rounding_warnings, compat=options.compat)
    return replace(plan, options=given, decisions=decisions, warn=warn)


def _decisions(plans: Mapping[str, Plan]) -> dict:
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
    """Rows of the card: each adapter's part."""
    return [
        Merged(folder, adapter["weight"], adapter["modules"], part=name)
        for name, plan in plans.items()
        for folder, adapter in zip(plan.folders[1:], plan.decisions["adapters"], strict=True)
    ]

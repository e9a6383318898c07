"""subtract: remove the knowledge of general adapters from task adapters (GenKnowSub, ACL 2025 short
54): Δ' = Δ - mean of the general Δ."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from adapterkit.core import dtypes
from adapterkit.core.adapter import adapter_config
from adapterkit.core.adapter.record import Adapter
from adapterkit.core.adapter.selection import Selection, ends_of, selectable_names, text_of_entries
from adapterkit.core.errors import AdapterkitError, Problems, Refused, shown
from adapterkit.core.inputs.adapter_door import together
from adapterkit.core.inputs.sources import if_given, open_all, open_model, open_unconverted
from adapterkit.core.merge.sites import base_with_parameters, join, levels_of, names_of, targets_of
from adapterkit.core.plan import Plan, Task
from adapterkit.core.tasks import common
from adapterkit.core.weights.names import Names
from adapterkit.verbs.combine.methods.linear import Linear
from adapterkit.verbs.combine.planning.trained_values import trained_values
from adapterkit.verbs.combine.records.subtract import Subtract
from adapterkit.verbs.combine.tasks.combine import (
    CombinedFactors,
    Operand,
    Refit,
    SubtractedFactors,
)
from adapterkit.verbs.shared import adapter_output
from adapterkit.verbs.shared.joined_values import delta_problems, read_all


def plan_subtract(options: Subtract) -> Plan:
    """The plan of a subtraction; `Refused` with all problems."""
    task_sources, generals = open_all(options.adapters, options.general, opener=open_unconverted)
    base = if_given(open_model, options.base)
    if not task_sources or not generals:
        problem = f"{len(task_sources)} task adapters, {len(generals)} general ones"
        raise Refused(
            problem,
            expected="one or more of each",
            where="subtract",
            hint="give --general ADAPTER",
            code="AK107",
        )
    inputs, count = together([*task_sources, *generals], options.out), len(task_sources)
    if count > 1 and inputs.first is not None:
        raise Refused(
            f"{count} task adapters of a pipeline, or into one file",
            expected="one",
            where="subtract",
            hint="subtract from one after the other",
            code="AK107",
        )
    read = read_all(inputs.folders)
    task_adapters = read[:count]
    in_components = inputs.first is not None and any(inputs.first.components)
    selection = Selection(None, options.exclude, in_components)
    selection.known |= {name for adapter in read for name in selectable_names(adapter)}
    general_adapters = [_selected(adapter, selection) for adapter in read[count:]]
    errors = Problems(error for adapter in read for error in delta_problems(adapter, sums=True))
    errors += selection.refusals("a module of the adapters")
    errors += _same_names(task_adapters) + _whole_values(general_adapters)
    notes: list[str] = []
    model = base_with_parameters(base, read, notes)
    names = names_of(model, read, notes)
    outputs = [
        _output(task_adapter, general_adapters, options, selection, count > 1, names, errors)
        for task_adapter in task_adapters
    ]
    errors.raise_all()
    decisions = {
        "adapters": adapter_output.modules_of(task_adapters),
        "general": adapter_output.modules_of(general_adapters),
    }
    receipt_options = options.recipe_options() | {"tasks": count}
    sources = [*read, *([model] if model else [])]
    plan = adapter_output.plan_adapters(
        "subtract", receipt_options, sources, outputs, notes, decisions
    )
    return inputs.written(plan)


def _folder_name(adapter: Adapter) -> str:
    """The last part of the folder's path, or of its repository's name."""
    path = str(adapter.folder.origin.get("subfolder") or adapter.folder.name)
    return path.rpartition("/")[2]


def _same_names(task_sources: Sequence[Adapter]) -> list[AdapterkitError]:
    names = [_folder_name(adapter) for adapter in task_sources]
    errors = Problems(where="adapters", hint="rename one", code="AK107")
    for name in sorted({name for name in names if names.count(name) > 1}):
        errors.add(f"several task adapters called {shown(name)}", "different folder names")
    return errors


def _whole_values(generals: Sequence[Adapter]) -> list[AdapterkitError]:
    errors = Problems(where="--general", code="AK305")
    for key, holders in trained_values(generals, {}, copies=False).items():
        names = ", ".join(adapter.name for adapter in generals if adapter.number in holders)
        errors.add(
            f"{shown(key)} was fully trained by {names}",
            "general adapters with factors only, because other values cannot be subtracted",
            f'give --exclude "{_pattern(generals)}" to keep the task\'s own, or none',
        )
    return errors


def _pattern(generals: Sequence[Adapter]) -> str:
    whole = [
        (a, [*(a.replaced.keys() - a.copies.keys()), *(tokens.module for tokens in a.tokens)])
        for a in generals
    ]
    return text_of_entries(end for adapter, names in whole for end in ends_of(adapter, names))


def _selected(general: Adapter, selects: Selection) -> Adapter:
    """The adapter with its selected modules alone."""
    if selects.excluded is None:
        return general
    return replace(
        general,
        loras=tuple(lora for lora in general.loras if selects(lora.module)),
        replaced={
            name: spec
            for name, spec in general.replaced.items()
            if selects(name, name.rpartition(".")[0])
        },
        tokens=tuple(tokens for tokens in general.tokens if selects(tokens.module)),
    )


def _output(
    task_adapter: Adapter,
    generals: Sequence[Adapter],
    options: Subtract,
    selects: Selection,
    several: bool,
    names: Names | None,
    errors: Problems,
) -> adapter_output.Output:
    joined = join([task_adapter, *generals], errors, names)
    prefix = f"{_folder_name(task_adapter)}: " if several else ""
    refit = Refit(options.rank, options.energy)
    dtype = dtypes.parse(options.dtype)
    tasks: list[Task] = []
    alone = {
        name
        for name, site in joined.items()
        if site.members.keys() == {task_adapter.number} and not selects(site.module)
    }
    if options.space == "factors":
        for name in (name for name in joined if name not in alone):
            _check_ranks(name, joined[name].members, [task_adapter, *generals], errors)
        joined = {n: site for n, site in joined.items() if task_adapter.number in site.members}
    levels = levels_of(joined.values())
    weights = {general.number: -1.0 / len(generals) for general in generals}
    weights |= {task_adapter.number: 1.0}
    for name, site in joined.items():
        members, place = site.members, site.place(levels)
        if options.space == "factors" and name not in alone:
            own = members[task_adapter.number]
            others = tuple(f for n, f in members.items() if n != task_adapter.number)
            tasks.append(SubtractedFactors(prefix + name, place, dtype, own.rank, own, others))
            continue
        operands = tuple(Operand(n, factors, weights[n]) for n, factors in members.items())
        tasks.append(CombinedFactors(prefix + name, place, dtype, operands, Linear(), refit))
    if any(one.base_change for one in (task_adapter, *generals)):
        from adapterkit.verbs.combine.planning.initial_factors import check_sum

        other = "--space factors" if options.space == "factors" else ""
        sums = {
            one.name.removeprefix(prefix): one for one in tasks if isinstance(one, CombinedFactors)
        }
        check_sum([task_adapter, *generals], joined, sums, other, errors)
    tasks += adapter_output.sum_biases(
        joined, lambda number, module: weights[number], dtype, errors, prefix
    )
    for key, holders in trained_values([task_adapter], levels).items():
        tasks += [
            common.CopiedTensor(prefix + key, spec, key, checked=True) for spec in holders.values()
        ]
    loras = [lora for site in joined.values() for lora in site.members.values()]
    settings = adapter_config.plain_settings() | adapter_config.value_settings([task_adapter])
    settings |= {"lora_bias": any(lora.bias is not None for lora in loras)}
    summary = f"the mean of {len(generals)} general adapters subtracted, in {options.space} space"
    return adapter_output.Output(
        [task_adapter, *generals],
        tasks,
        folder=_folder_name(task_adapter) if several else "",
        settings=settings,
        summary=summary,
        tokenizer=options.tokenizer,
        **targets_of(joined, prefix),
    )


def _check_ranks(
    name: str, members: Mapping, adapters: Sequence[Adapter], errors: Problems
) -> None:
    """Refuse to average factors unless all adapters have the module, at one rank."""
    ranks = {number: factors.rank for number, factors in members.items()}
    if len(ranks) < len(adapters) or len(set(ranks.values())) > 1:
        of_all = ", ".join(f"{a.name} {ranks.get(a.number, 'none')}" for a in adapters)
        problem, expected = f"{shown(name)}: ranks {of_all}", "one rank, in all of them"
        errors.add(problem, expected, "use --space delta", where="--space factors", code="AK305")

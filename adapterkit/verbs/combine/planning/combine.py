"""combine: merge several adapters into one. Three choices: the method; its space (deltas, or PEFT's
factors); the refit of the result (exact, a rank, a share of the energy)."""

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from adapterkit.core import dtypes
from adapterkit.core.adapter import adapter_config
from adapterkit.core.adapter.record import Adapter
from adapterkit.core.checkpoint.folder import Folder
from adapterkit.core.checkpoint.spec import Checkpoint, open_checkpoint
from adapterkit.core.commands import PLAIN
from adapterkit.core.errors import Problems, Refused, as_usage, shown
from adapterkit.core.inputs.adapter_door import together
from adapterkit.core.inputs.base_door import read_checkpoint
from adapterkit.core.inputs.earlier_merges import notes_on_copies
from adapterkit.core.inputs.sources import if_given, open_model, open_statistics, open_unconverted
from adapterkit.core.inputs.weights_file import open_with_weights
from adapterkit.core.lazy import Tensor, torch
from adapterkit.core.merge.sites import (
    JoinedSite,
    base_with_parameters,
    join,
    levels_of,
    names_of,
    targets_of,
)
from adapterkit.core.plan import Plan
from adapterkit.core.records import Json
from adapterkit.core.tasks import common
from adapterkit.core.weights.plan_reader import PlanReader
from adapterkit.kernels.lowrank.algebra import Product, gram
from adapterkit.verbs.combine.methods import ALIASES
from adapterkit.verbs.combine.methods.common import WeightedSum
from adapterkit.verbs.combine.methods.protocol import Method
from adapterkit.verbs.combine.module_methods import method_of, resolved_weights
from adapterkit.verbs.combine.planning.covariances import (
    check_statistics,
    with_group_weights,
    with_statistics,
    without_inputs,
)
from adapterkit.verbs.combine.planning.trained_values import check_wrappers, value_tasks
from adapterkit.verbs.combine.records.combine import Combine
from adapterkit.verbs.combine.tasks.combine import CombinedFactors, Operand, Refit
from adapterkit.verbs.shared import adapter_output
from adapterkit.verbs.shared.joined_values import AdapterWeights, delta_problems, read_all

if TYPE_CHECKING:
    from adapterkit.adapters.kinds.dora_deltas import BaseWeights


def plan_combine(options: Combine) -> Plan:
    """The plan of a combination; `Refused` with all problems."""
    sources, file = open_with_weights(options.adapters, options.weights, open_unconverted)
    inputs = together([folder for folder, _ in sources], options.out)
    base = if_given(open_model, options.base)
    stats = [open_statistics(path) for path in options.stats]
    method, refit = _resolve_method(options)
    if not options.data and (stats or method.acts_on == "covariances"):
        with as_usage():
            check_statistics(method, refit, options.space, len(sources), len(stats))
    _check_count(options, len(sources))
    adapters = read_all(inputs.folders)
    own = [weight for _, weight in sources]
    given_weights = resolved_weights(method, own, options.weight_for, file)
    weights = AdapterWeights(given_weights, tuple(options.weight_for), file)
    notes, errors = notes_on_copies(adapters), Problems()
    model, decomposed = _base(base, adapters, notes, errors, runs=bool(options.data))
    joined = join(adapters, errors, names_of(model, adapters, notes))
    levels, dtype = levels_of(joined.values()), dtypes.parse(options.dtype)
    whole = value_tasks(adapters, weights, without_inputs(method), levels, errors)
    if method.scales:
        _check_scaled(adapters, options, errors)
        errors.raise_all()
        weights.scale = method.scale(_gram(joined, weights, inputs.folders))
        notes.append(f"all weights times {weights.scale:.3f} ({method.name}, over all modules)")
    tasks: list[CombinedFactors] = []
    for name, site in joined.items():
        with errors.collected():
            operands = _operands(name, site, weights, decomposed, method, options.space)
            _check_fit(name, operands, adapters, options, (method, refit), errors)
            how = method, refit, options.space, options.seed
            tasks.append(CombinedFactors(name, site.place(levels), dtype, operands, *how))
    first = len(adapters) + (model is not None)
    statistics = [open_checkpoint(folder, number) for number, folder in enumerate(stats, first)]
    parameters = {n for n, site in joined.items() if site.parameter}
    if statistics and tasks:
        tasks = with_statistics(tasks, statistics, parameters, notes, errors)
    mark = _mark(adapters, joined, tasks, (options, method), errors)
    biases = _biases(joined, weights, options, errors)
    errors += weights.problems()
    if parameters:
        check_wrappers(adapters, joined.values(), errors)
    read = [*adapters, *([model] if model else []), *statistics]
    found: dict[str, list[float]] = {}
    if method.over != "module":
        _check_groups(method, decomposed, errors)
        errors.raise_all()
        tasks, found = with_group_weights(tasks, read, given_weights, notes)
    errors.raise_all()
    adapter_output.check_factors(tasks, "combine")
    settings = adapter_config.plain_settings() | adapter_config.value_settings(adapters)
    spelled = ", ".join(f"{weights.scale * weight:g}" for weight in given_weights)
    output = adapter_output.Output(
        adapters,
        [*tasks, *biases, *whole],
        settings=settings | mark | {"lora_bias": bool(biases)},
        summary=f"{options.method} in {options.space} space, weights {spelled}; {method.source}",
        tokenizer=options.tokenizer,
        **targets_of(joined),
    )
    return inputs.written(_plan(options, weights, adapters, output, notes, read, found))


def _plan(
    options: Combine,
    weights: AdapterWeights,
    adapters: list[Adapter],
    output: adapter_output.Output,
    notes: list[str],
    inputs: list[Adapter | Checkpoint],
    found: dict[str, list[float]],
) -> Plan:
    receipt_options = options.recipe_options() | {"weights": weights.weights}
    if weights.file is not None:
        receipt_options |= weights.file.in_receipt()
    if options.settings:
        receipt_options["settings"] = tuple(options.settings.items())
    if options.rank:
        from adapterkit.verbs.combine.planning.large_ranks import note_large_rank

        tasks = [task for task in output.tasks if isinstance(task, CombinedFactors)]
        notes += note_large_rank(options.rank, tasks, "all that their inputs have together")
    decisions: Json = {"weights": found} if found else {}
    decisions |= {
        "adapters": [
            {"name": a.name, "weight": weights.scale * w, "modules": len(a.loras)}
            for a, w in zip(adapters, weights.weights, strict=True)
        ]
    }
    return adapter_output.plan_adapters(
        "combine", receipt_options, inputs, [output], notes, decisions
    )


def _mark(
    adapters: list[Adapter],
    joined: dict[str, JoinedSite],
    tasks: Sequence[CombinedFactors],
    how: tuple[Combine, Method],
    errors: Problems,
) -> Json:
    """The setting that marks adapters of a changed base; refuses what does not restore its initial
    factors."""
    if not any(adapter.base_change for adapter in adapters):
        return {}
    from adapterkit.verbs.combine.planning.initial_factors import check_sum

    options, method = how
    other = f"--method {options.method}" + " --space factors" * (options.space == "factors")
    is_sum = options.space == "delta" and isinstance(method, WeightedSum)
    named = {task.name: task for task in tasks}
    return check_sum(adapters, joined, named, "" if is_sum else other, errors)


def _check_scaled(adapters: list[Adapter], options: Combine, errors: Problems) -> None:
    """Refuse a strength for deltas that are no sum of b @ a."""
    doras = [adapter.name for adapter in adapters if adapter.config.get("use_dora")]
    problem = f"DoRA ({', '.join(doras)})" if doras else ""
    problem = "--space factors" if options.space == "factors" else problem
    if problem:
        errors.add(
            f"--set strength with {problem}",
            "a sum of LoRAs in --space delta",
            "remove --set strength",
            where="options",
            code="AK305",
        )


def _check_groups(method: Method, doras: Collection[int], errors: Problems) -> None:
    """Refuse weights over several modules for deltas that are no b @ a."""
    if doras:
        errors.add(
            f"{method.name} over the modules of a {method.over}, with a DoRA",
            "LoRAs, or one set of weights for each module",
            "give --set per=module",
            where="--method",
            code="AK305",
        )


def _gram(
    joined: dict[str, JoinedSite], weights: AdapterWeights, folders: Sequence[Folder]
) -> Tensor:
    """⟨wᵢ Δᵢ, wⱼ Δⱼ⟩ over all modules, from the factors, which are read here."""
    reader, total = PlanReader(folders), torch.zeros(len(folders), len(folders)).double()
    for name, site in joined.items():
        numbers = list(site.members)
        weighted = [weights.on(n, name, factors) for n, factors in site.members.items()]
        products = [
            [Product(w * p.left, p.right) for p in factors.products(reader)]
            for w, factors in weighted
        ]
        for each in zip(*products, strict=True):
            total[[[n] for n in numbers], numbers] += gram(each)
    return total


def _base(
    base: Folder | None, adapters: list[Adapter], notes: list[str], errors: Problems, *, runs: bool
) -> tuple[Checkpoint | None, "dict[int, BaseWeights]"]:
    """The base, if the model runs or the adapters need it, and its weights for each DoRA by the
    adapter's number. Adapters whose deltas cannot be summed join the errors."""
    doras = [adapter for adapter in adapters if adapter.config.get("use_dora")]
    if base is None or not (doras or runs):
        hint = "give --base BASE, the model it was trained on, and --rank R"
        errors += (error for one in adapters for error in delta_problems(one, hint, sums=True))
        return base_with_parameters(base, adapters, notes), {}
    from adapterkit.adapters.kinds.dora_deltas import BaseWeights, dora_problems

    model = read_checkpoint(base, len(adapters))
    for adapter in adapters:
        is_dora = adapter.config.get("use_dora")
        errors += dora_problems(adapter) if is_dora else delta_problems(adapter, sums=True)
    modules = {a.number: [lora.module for lora in a.loras] for a in doras}
    return model, {a.number: BaseWeights(model, a, modules[a.number], notes) for a in doras}


def _check_count(options: Combine, count: int) -> None:
    if options.fit and not options.dry_run:
        raise Refused(
            "--fit runs the model, which a plan does not",
            expected="a combination of its own",
            where="options",
            hint="first fit the weights, then give --weights weights.json\n"
            "adapterkit fit BASE ADAPTERS --data FILE --out weights.json",
            code="AK107",
        )
    if count < 2 and not (count and (options.rank or options.energy or options.weights)):
        raise Refused(
            "no adapters were given" if not count else "only one adapter was given",
            expected="two or more",
            where="combine",
            hint="name the adapters, or change the rank of one\n"
            "adapterkit resize ADAPTER --energy 0.99 --out smaller",
            code="AK107",
        )


def _operands(
    name: str,
    site: JoinedSite,
    weights: AdapterWeights,
    decomposed: "dict[int, BaseWeights]",
    method: Method,
    space: str,
) -> tuple[Operand, ...]:
    """The adapters' operands on a module; `Refused` for weights that the method does not take.

    Adapters of weight 0 are skipped unless all weights are 0, so weights (1, 0) give the method's
    result for the first one alone. Factor space keeps them, as PEFT does, because their signs count
    there."""
    operands = []
    for number, factors in site.members.items():
        dora = decomposed[number].dora(factors) if number in decomposed else None
        weight, factors = weights.on(number, name, factors)
        operands.append(Operand(number, factors, weight, dora))
    if space == "delta":
        operands = [operand for operand in operands if operand.weight] or operands
    method.check_weights([operand.weight for operand in operands])
    return tuple(operands)


def _resolve_method(options: Combine) -> tuple[Method, Refit]:
    """The method's record and the refit; `Refused` for options that do not fit."""
    method, default = ALIASES.get(options.method, (options.method, None))
    record = method_of(method, options)
    dense = record.acts_on == "elements"
    is_by_factors = options.method not in ALIASES and (dense or method == "linear")
    if options.space == "factors" and not is_by_factors:
        problem = f"{method} is not defined on A and B separately (--space factors)"
        expected = "linear, or a method on elements"
        if options.method in ALIASES:
            problem = f"--space factors keeps the ranks: it takes no {options.method}"
            expected = "--space factors with a method without a refit"
        hint = "remove --space factors"
        raise Refused(problem, expected=expected, where="options", hint=hint, code="AK102")
    largest = default == "largest" or (dense and default is None)
    fixed = options.rank is not None or options.energy is not None
    return record, Refit(options.rank, options.energy, largest and not fixed, options.svd_clamp)


def _check_fit(
    name: str,
    operands: tuple[Operand, ...],
    adapters: Sequence[Adapter],
    options: Combine,
    how: tuple[Method, Refit],
    errors: Problems,
) -> None:
    """Refuse a DoRA whose delta is not refitted or needs factors, and factors of several ranks that
    cannot be added one by one."""
    method, refit = how
    by_factors = options.space == "factors"
    if any(operand.factors.directions and (operand.dora or by_factors) for operand in operands):
        what = (
            "a and b separately (--space factors)" if by_factors else "a DoRA, whose rank is full"
        )
        errors.add(
            f"{shown(name)}: weights of directions of {what}",
            "one number for each adapter",
            "give one number in the file of weights",
            where="--weights",
            code="AK305",
        )
    doras = [adapters[operand.number].name for operand in operands if operand.dora]
    if doras and method.by_factors:
        errors.add(
            f"{shown(name)}: {method.name} needs b and a, not the delta of a DoRA "
            f"({', '.join(doras)})",
            "LoRAs, or a method that acts on deltas",
            PLAIN,
            where="--method",
            code="AK305",
        )
    elif doras and (by_factors or refit.exact):
        where = "--space factors" if by_factors else "an exact result"
        errors.add(
            f"{shown(name)}: {where} does not work with DoRA ({', '.join(doras)})",
            "a refit in --space delta: a DoRA's delta has full rank",
            "give --rank R or --energy E",
            where="options",
            code="AK305",
        )
    elif by_factors and len({operand.factors.rank for operand in operands}) > 1:
        listing = ", ".join(f"{adapters[p.number].name} {p.factors.rank}" for p in operands)
        problem = f"{shown(name)}: the ranks differ, {listing}"
        expected, hint = "one rank in --space factors", "use --space delta"
        errors.add(problem, expected, hint, where="adapters", code="AK305")


def _biases(
    joined: dict[str, JoinedSite], weights: AdapterWeights, options: Combine, errors: Problems
) -> list[common.SummedTensor]:
    """The biases that LoRAs add. They follow the weights, so only `linear` defines their sum."""
    tasks = adapter_output.sum_biases(joined, weights.of, dtypes.parse(options.dtype), errors)
    if tasks and (
        ALIASES.get(options.method, (options.method,))[0] != "linear" or options.space != "delta"
    ):
        errors.add(
            f"{options.method} in {options.space} space cannot combine lora_bias",
            "linear in delta space",
            "use --method linear",
            where="--method",
            code="AK305",
        )
    return tasks

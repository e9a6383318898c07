"""arrow: experts stacked once, with the prototypes that route tokens to them (Arrow,
arXiv:2405.11157), as files."""

from collections.abc import Sequence

from adapterkit import __version__, dtypes
from adapterkit.adapters import adapter_config
from adapterkit.adapters.record import Adapter
from adapterkit.errors import AdapterkitError, Problems, Refused, shown
from adapterkit.plan import OutputFile, Plan
from adapterkit.planning.adapters.joined_values import delta_problems, read_all, trained_values
from adapterkit.planning.adapters.sites import join
from adapterkit.planning.inputs.input_identity import plan_of
from adapterkit.planning.inputs.sources import open_all
from adapterkit.planning.outputs.cards import hub_id_or_name
from adapterkit.planning.outputs.folder_files import as_json
from adapterkit.tasks.arrow import StackedExperts
from adapterkit.verbs.arrow import Arrow

FORMAT = 1
WEIGHTS, CONFIG = "arrow.safetensors", "arrow.json"


def plan_arrow(options: Arrow) -> Plan:
    """Everything arrow will do, or `Refused` with all that cannot be done."""
    expert_folders, generals = open_all(adapters=options.adapters, general=options.general)
    _check(options, len(expert_folders))
    read = read_all([*expert_folders, *generals])
    experts, general = read[: len(expert_folders)], read[len(expert_folders) :]
    errors = Problems()
    for adapter in read:
        errors += delta_problems(adapter) + _not_routable(adapter)
    joined = join(read, errors)
    tasks: list[StackedExperts] = []
    for name, site in joined.items():
        parts = tuple(
            (number, factors)
            for number, (_, factors) in site.members.items()
            if number < len(experts)
        )
        general_factors = tuple(
            factors for number, (_, factors) in site.members.items() if number >= len(experts)
        )
        if not parts:
            continue
        if options.compat == "peft":
            errors += _check_ranks(name, parts, general_factors, read)
        counts, dtype = (len(general), len(experts)), dtypes.parse(options.dtype)
        how = options.compat, options.seed or 0
        tasks.append(StackedExperts(name, parts, general_factors, *counts, *how, dtype))
    Problems(errors).raise_all()
    if not tasks:
        raise Refused(
            "no module with factors",
            expected="adapters of low-rank factors",
            where="arrow",
            hint="check the adapters",
        )
    notes = _coverage(tasks, experts)
    receipt_options = options.recipe_options() | {"experts": len(experts)}
    decisions = {"adapters": [{"name": a.name, "modules": len(a.loras)} for a in experts]}
    return plan_of(
        "arrow",
        receipt_options,
        dict(enumerate(read)),
        shards=[OutputFile.computed(WEIGHTS, tasks)],
        files={CONFIG: as_json(_config(options, experts, general))},
        decisions=decisions,
        notes=notes,
        models=(),
    )


def _config(options: Arrow, experts: Sequence[Adapter], general: Sequence[Adapter]) -> dict:
    """The content of arrow.json."""
    read = [*experts, *general]
    config = {
        "arrow": FORMAT,
        "adapterkit": __version__,
        "top_k": options.top_k or min(3, len(experts)),
        "temperature": options.temperature,
        "experts": [a.folder.name for a in experts],
        "general": [a.folder.name for a in general],
        "base_model_name_or_path": adapter_config.base_id(experts[0]),
        "sources": [{"name": hub_id_or_name(a.folder), "header": a.header_sha256} for a in read],
    }
    return config | (
        {"compat": options.compat, "seed": options.seed or 0} if options.compat else {}
    )


def _check(options: Arrow, count: int) -> None:
    errors = Problems()
    if not count:
        errors.add("no adapters were given", "one or more", "name the adapters", where="arrow")
    if options.top_k is not None and not 0 < options.top_k <= count:
        errors.add(
            f"--top-k is {options.top_k}, with {count} experts",
            f"1 to {count}",
            "give fewer" if options.top_k > 0 else "give at least 1",
            where="options",
        )
    errors.raise_all()


def _not_routable(adapter: Adapter) -> list[AdapterkitError]:
    """What a router over linear layers cannot hold."""
    not_linear_modules = [
        lora.module
        for lora in adapter.loras
        if lora.kind != "module" or len(lora.a.shape) > 2 or lora.bias is not None
    ]
    not_linear_modules += [adapter.name] * bool(adapter.config.get("target_parameters")) + [
        *trained_values([adapter], {}, copies=False)
    ]
    if not not_linear_modules:
        return []
    problem = (
        f"{adapter.name} adapts more than linear layers: "
        f"{', '.join(map(shown, not_linear_modules[:6]))}"
    )
    hint = "train the experts on linear layers only"
    return [
        Refused(
            problem,
            expected="no embeddings, convolutions, biases, expert stacks or values trained in full",
            where="arrow",
            hint=hint,
        )
    ]


def _check_ranks(
    name: str, parts: tuple, general_factors: tuple, read: Sequence[Adapter]
) -> list[AdapterkitError]:
    ranks = {factors.rank for _, factors in parts} | {factors.rank for factors in general_factors}
    if len(ranks) == 1:
        return []
    expected = "one rank, as PEFT requires"
    return [
        Refused(
            f"{shown(name)}: ranks {sorted(ranks)}",
            expected=expected,
            where="--compat peft",
            hint="remove --compat peft",
        )
    ]


def _coverage(tasks: Sequence["StackedExperts"], experts: Sequence[Adapter]) -> list[str]:
    partly = [task.name for task in tasks if len(task.parts) < len(experts)]
    return (
        [f"{len(partly)} modules are not in all experts (first {shown(partly[0])})"]
        if partly
        else []
    )

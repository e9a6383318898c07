"""arrow: experts stacked once, with the prototypes that route tokens to them (Arrow,
arXiv:2405.11157), as files."""

from collections.abc import Sequence

from adapterkit import __version__
from adapterkit.core import dtypes
from adapterkit.core.adapter import adapter_config
from adapterkit.core.adapter.record import Adapter
from adapterkit.core.errors import AdapterkitError, Problems, shown
from adapterkit.core.inputs.input_identity import plan_of
from adapterkit.core.inputs.sources import open_all
from adapterkit.core.merge.sites import join
from adapterkit.core.outputs.cards import hub_id_or_name
from adapterkit.core.outputs.folder_files import as_json
from adapterkit.core.plan import OutputFile, Plan
from adapterkit.verbs.combine.planning.trained_values import trained_values
from adapterkit.verbs.combine.records.arrow import Arrow
from adapterkit.verbs.combine.tasks.arrow import StackedExperts
from adapterkit.verbs.shared import adapter_output
from adapterkit.verbs.shared.joined_values import delta_problems, read_all

FORMAT = 1
WEIGHTS, CONFIG = "arrow.safetensors", "arrow.json"


def plan_arrow(options: Arrow) -> Plan:
    """Everything arrow will do, or `Refused` with all that cannot be done."""
    expert_folders, generals = open_all(options.adapters, options.general)
    _check(options, len(expert_folders))
    read = read_all([*expert_folders, *generals])
    experts, general = read[: len(expert_folders)], read[len(expert_folders) :]
    errors = Problems(code="AK101")
    for adapter in read:
        errors += delta_problems(adapter) + _not_routable(adapter)
    joined = join(read, errors)
    tasks: list[StackedExperts] = []
    counts, dtype = (len(general), len(experts)), dtypes.parse(options.dtype)
    for name, site in joined.items():
        parts = tuple(pair for pair in site.members.items() if pair[0] < len(experts))
        others = tuple(one for number, one in site.members.items() if number >= len(experts))
        ranks = {factors.rank for factors in site.members.values()}
        if parts and options.compat == "peft" and len(ranks) > 1:
            problem, expected = (
                f"{shown(name)}: ranks {sorted(ranks)}",
                "one rank, as PEFT requires",
            )
            errors.add(problem, expected, "remove --compat peft", where="--compat peft")
        if parts:
            how = options.compat, options.seed or 0
            tasks.append(StackedExperts(name, parts, others, *counts, *how, dtype))
    errors.raise_all()
    adapter_output.check_factors(tasks, "arrow")
    partly = [task.name for task in tasks if len(task.parts) < len(experts)]
    missing = (
        f"{len(partly)} modules are not in all experts (first {shown(partly[0])})" if partly else ""
    )
    return plan_of(
        "arrow",
        options.recipe_options() | {"experts": len(experts)},
        read,
        shards=[OutputFile.computed(WEIGHTS, tasks)],
        files={CONFIG: as_json(_config(options, experts, general))},
        decisions={"adapters": adapter_output.modules_of(experts)},
        notes=filter(None, [missing]),
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
    how = {"compat": options.compat, "seed": options.seed or 0}
    return config | (how if options.compat else {})


def _check(options: Arrow, count: int) -> None:
    errors = Problems(code="AK101")
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
    others = [
        lora.module
        for lora in adapter.loras
        if lora.kind != "module" or len(lora.a.shape) > 2 or lora.bias is not None
    ]
    others += [adapter.name] * bool(adapter.config.get("target_parameters"))
    others += trained_values([adapter], {}, copies=False)
    errors = Problems(where="arrow", code="AK305")
    if others:
        errors.add(
            f"{adapter.name} adapts more than linear layers: {', '.join(map(shown, others[:6]))}",
            "no embeddings, convolutions, biases, expert stacks or values trained in full",
            "train the experts on linear layers only",
        )
    return errors

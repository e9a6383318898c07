"""inspect of an adapter: its config, and its modules with rank, scale and norms."""

from collections.abc import Callable

from adapterkit.core.adapter.peft import scan_adapter
from adapterkit.core.adapter.record import Adapter, Lora, rank_mismatch
from adapterkit.core.checkpoint.folder import Folder
from adapterkit.core.checkpoint.shards import weight_files
from adapterkit.core.checkpoint.spec import Checkpoint
from adapterkit.core.errors import Refused, shown
from adapterkit.core.lazy import Tensor, torch
from adapterkit.core.options import Progress, no_progress
from adapterkit.core.records import Json
from adapterkit.verbs.look.checkpoint import (
    add_problem,
    check_pickles,
    check_tensors,
    finish_result,
    new_result,
    some_names,
)
from adapterkit.verbs.look.configs import printable
from adapterkit.verbs.look.heatmaps import natural
from adapterkit.verbs.look.join import Join, join

FLAGS = ("lora_bias", "bias", "ensure_weight_tying", "layer_replication", "target_parameters")


def inspect_adapter(
    folder: Folder,
    base: Folder | None,
    with_factors: bool,
    progress: Progress = no_progress,
    spectra: dict[str, Tensor] | None = None,
    more: Callable[..., Json] = lambda *its: {},
) -> Json:
    """inspect's result for an adapter; `with_factors`: read them for norms and effective ranks, and
    fill `spectra` if given; `more`: other entries, from the adapter, its modules and problems."""
    adapter, scan, typed = scan_adapter(folder)
    check_tensors(scan, mixed=False)
    check_pickles(scan, "the adapter")
    others = weight_files(folder)
    if others:
        problem = f"other weights next to the adapter's: {some_names(others)}"
        hint = "inspect a model in a folder of its own"
        add_problem(scan, problem, "only the adapter", hint)
    modules = _modules(adapter, typed, base, with_factors, scan, progress, spectra)
    result = new_result("adapter", scan) | _adapter_keys(adapter)
    result |= {"groups": _groups(modules), "statistics": with_factors}
    result |= more(adapter, modules, scan.errors)
    return result | finish_result(scan, modules)


def _modules(
    adapter: Adapter,
    typed: bool,
    base: Folder | None,
    with_factors: bool,
    scan: Checkpoint,
    progress: Progress,
    spectra: dict[str, Tensor] | None,
) -> list[Json]:
    """The adapted modules in natural order, and the problems of their factors."""
    joined = None
    if base is not None and typed and with_factors:
        joined = join(adapter, base, scan.errors)
    modules = [_module(adapter, lora, joined, typed, scan) for lora in adapter.loras]
    if with_factors:
        from adapterkit.verbs.look.factors import read_factors

        at = (None, {}) if joined is None else (joined.base, joined.parameters)
        with torch.inference_mode():
            read_factors(adapter, modules, *at, scan.errors, progress, spectra)
        trained = any(module["trained"] for module in modules) or adapter.replaced or adapter.tokens
        if modules and not trained:
            hint = "check that training ran before the save"
            add_problem(scan, "no module is trained: every b is zero", "a trained adapter", hint)
    return sorted(modules, key=lambda module: natural(module["module"]))


def _adapter_keys(adapter: Adapter) -> Json:
    """Settings of the config, replaced parameters and token rows."""
    setting = adapter.config.get
    flags = {
        "rslora": bool(setting("use_rslora")),
        "dora": bool(setting("use_dora")),
        "init": setting("init_lora_weights"),
        **{key: setting(key) for key in FLAGS},
    }
    keys = {
        "format": adapter.folder.origin.get("format", "peft"),
        "base": setting("base_model_name_or_path"),
        **{key: setting(key) for key in ("peft_type", "revision", "task_type", "peft_version")},
        "flags": flags,
        "modules_to_save": setting("modules_to_save") or [],
        "replaced": sorted(adapter.replaced, key=natural),
        "tokens": [
            {"module": tokens.module, "rows": list(tokens.indices)} for tokens in adapter.tokens
        ],
    }
    return printable(keys)


def _module(
    adapter: Adapter, lora: Lora, joined: Join | None, typed: bool, scan: Checkpoint
) -> Json:
    """One adapted module from its header and the config, without statistics of its factors."""
    at, stored = (lora.module, lora.depth), lora.a.shape[0]
    parameter, experts = None, None
    if joined is not None and at in joined.parameters:
        parameter, experts = joined.parameters[at].name, joined.experts[at]
    rank, alpha, scale = None, None, None
    if typed:
        rank, alpha, scale = _rank_alpha_scale(adapter, lora, parameter, scan)
    if rank and parameter is None and stored != rank and stored % rank == 0:
        experts = stored // rank if _leaves(adapter, lora) else None
    if rank is not None and stored != rank * (experts or 1):
        scan.errors.include(rank_mismatch(adapter, lora, stored, rank))
        rank = scale = None
    place = {
        "module": lora.module,
        "kind": lora.kind,
        "depth": lora.depth,
        "parameter": parameter,
        "experts": experts,
    }
    unknown = dict.fromkeys(("trained", "norm", "effective_rank", "relative"))
    return place | {"rank": rank or stored, "alpha": alpha, "scale": scale} | unknown


def _rank_alpha_scale(
    adapter: Adapter, lora: Lora, parameter: str | None, scan: Checkpoint
) -> tuple[int | None, float | None, float | None]:
    """Rank, alpha and scale by the config, whose patterns match the name of the module, or of its
    parameter if target_parameters names it; None if they are ambiguous or a pattern is invalid."""
    own = None if parameter is None else [parameter.rpartition(".")[2]]
    names = [adapter.pattern_name(lora, leaf) for leaf in _leaves(adapter, lora, own) or [None]]
    try:
        r, lora_alpha = adapter.config["r"], adapter.config["lora_alpha"]
        values = {adapter.rank_and_alpha(name, r, lora_alpha) for name in names}
    except Refused as error:  # a pattern that cannot be used
        scan.errors.include(error)
        return None, None, None
    if len(values) > 1:
        add_problem(
            scan,
            f"ambiguous parameters of {shown(lora.module)}",
            "one rank and alpha for all target_parameters of a module "
            "(PEFT's file names the nesting only)",
            "give --base",
            adapter.name,
        )
        return None, None, None
    rank, alpha = values.pop()
    return rank, alpha, adapter.scale(rank, alpha)


def _leaves(adapter: Adapter, lora: Lora, own: list[str] | None = None) -> list[str]:
    """The module's parameters that target_parameters may mean; only the base determines which one
    it is."""
    return adapter.leaves(lora.module, own) if lora.kind == "module" else []


def _groups(modules: list[Json]) -> list[Json]:
    """Counts of modules with equal values, by the last component of their names, plus the
    parameter's name unless that is `weight`."""
    counts: dict[tuple, int] = {}
    for module in modules:
        own = (module["parameter"] or "").rpartition(".")[2]
        name = module["module"].rpartition(".")[2]
        name += f".{own}" if own not in ("", "weight") else ""
        key = (name, *(module[value] for value in ("kind", "rank", "alpha", "scale")))
        counts[key] = counts.get(key, 0) + 1
    names = ("modules", "kind", "rank", "alpha", "scale")
    return [dict(zip(names, key, strict=True)) | {"count": count} for key, count in counts.items()]

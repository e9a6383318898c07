"""inspect of an adapter: its modules with rank, scale, norms, and what its config says."""

from typing import TYPE_CHECKING, Any

from adapterkit.adapters.peft import scan_adapter
from adapterkit.adapters.record import Adapter, Lora
from adapterkit.checkpoint.folder import Folder
from adapterkit.checkpoint.shards import weight_files
from adapterkit.checkpoint.spec import Scan
from adapterkit.errors import Refused, shown
from adapterkit.reports.checkpoint import (
    add_problem,
    check_pickles,
    check_tensors,
    finish_result,
    new_result,
    some_names,
)
from adapterkit.reports.configs import printable

if TYPE_CHECKING:
    from adapterkit.plan import Progress
    from adapterkit.reports.factors import Join


def inspect_adapter(
    folder: Folder, on: Folder | None, reads: bool, progress: "Progress"
) -> dict[str, Any]:
    """An adapter; `on`: its base, `reads`: whether the factors are read."""
    adapter, seen, typed = scan_adapter(folder)
    check_tensors(seen, mixed=False)
    check_pickles(seen, "the adapter")
    others = weight_files(folder)
    if others:
        hint = "inspect a model in a folder of its own"
        add_problem(
            seen,
            f"other weights beside the adapter's: {some_names(others)}",
            "the adapter alone",
            hint,
        )
    modules = _modules(adapter, typed, on, reads, seen, progress)
    metrics = (
        new_result("adapter", seen)
        | _said(adapter)
        | {"groups": _groups(modules), "statistics": reads}
    )
    return metrics | finish_result(seen, modules)


def _modules(
    adapter: Adapter, typed: bool, on: Folder | None, reads: bool, seen: Scan, progress: "Progress"
) -> list[dict[str, Any]]:
    if not reads:
        return _in_order([_module(adapter, lora, None, typed, seen) for lora in adapter.loras])
    from adapterkit.reports import factors

    joined = factors.join(adapter, on, seen.errors) if on is not None and typed else None
    modules = [_module(adapter, lora, joined, typed, seen) for lora in adapter.loras]
    factors.read_factors(adapter, modules, joined, seen.errors, progress)
    if modules and not (
        any(module["trained"] for module in modules) or adapter.replaced or adapter.tokens
    ):
        add_problem(
            seen,
            "no module is trained: every b is zero",
            "a trained adapter",
            "check that training ran before the save",
        )
    return _in_order(modules)


def _in_order(modules: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(modules, key=lambda module: _natural(module["module"]))


def _said(adapter: Adapter) -> dict[str, Any]:
    """What the config says, and what the file holds besides factors."""
    said = adapter.config.get
    flags = {
        "rslora": bool(said("use_rslora")),
        "dora": bool(said("use_dora")),
        "init": said("init_lora_weights"),
    }
    flags |= {
        key: said(key)
        for key in (
            "lora_bias",
            "bias",
            "ensure_weight_tying",
            "layer_replication",
            "target_parameters",
        )
    }
    metrics = {
        "format": "peft",
        "base": said("base_model_name_or_path"),
        **{key: said(key) for key in ("peft_type", "revision", "task_type", "peft_version")},
        "flags": flags,
        "modules_to_save": said("modules_to_save") or [],
        "replaced": sorted(adapter.replaced, key=_natural),
        "tokens": [
            {"module": tokens.module, "rows": list(tokens.indices)} for tokens in adapter.tokens
        ],
    }
    return printable(metrics)


def _module(
    adapter: Adapter, lora: Lora, joined: "Join | None", typed: bool, seen: Scan
) -> dict[str, Any]:
    """One adapted module, by its header and the config; what its factors do is filled in later."""
    at, stored = (lora.module, lora.depth), lora.a.shape[0]
    parameter = (
        joined.parameters[at].name if joined is not None and at in joined.parameters else None
    )
    rank, alpha, scale = _settings(adapter, lora, parameter, seen) if typed else (None, None, None)
    experts = joined.experts.get(at) if joined is not None else None
    if (
        parameter is None
        and rank
        and stored != rank
        and stored % rank == 0
        and _leaves(adapter, lora)
    ):
        experts = stored // rank
    if rank is not None and stored != rank * (experts or 1):
        found = f"rank {stored} in the file for {shown(lora.module)}"
        hint = "restore the config that was saved with the file (a wrong rank means a wrong scale)"
        add_problem(seen, found, f"rank {rank}, as r and rank_pattern say", hint, adapter.where)
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


def _settings(
    adapter: Adapter, lora: Lora, parameter: str | None, seen: Scan
) -> tuple[int | None, float | None, float | None]:
    """Rank, alpha and scale as the config says, which speaks of a module, or of its parameter where that has a name of its own."""
    own = None if parameter is None else [parameter.rpartition(".")[2]]
    names = [adapter.pattern_name(lora, leaf) for leaf in _leaves(adapter, lora, own) or [None]]
    try:
        r, lora_alpha = adapter.config["r"], adapter.config["lora_alpha"]
        found = {adapter.patterned(name, r, lora_alpha) for name in names}
    except Refused as error:  # a pattern that cannot be used
        seen.add_error(error)
        return None, None, None
    if len(found) > 1:
        expected = "one rank and alpha for all target_parameters of a module (PEFT's file names the nesting only)"
        add_problem(
            seen,
            f"parameters of {shown(lora.module)} that cannot be told apart",
            expected,
            "give --base",
            adapter.name,
        )
        return None, None, None
    rank, alpha = found.pop()
    return rank, alpha, adapter.scale(rank, alpha)


def _leaves(adapter: Adapter, lora: Lora, own: list[str] | None = None) -> list[str]:
    """Those parameters of the module that target_parameters may mean; without a base the file does not say which of them it is."""
    return adapter.leaves(lora.module, own) if lora.kind == "module" else []


def _groups(modules: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Modules counted by the last component of their names (a parameter's name, where it has one of its own) and equal values."""
    counts: dict[tuple, int] = {}
    for module in modules:
        own = (module["parameter"] or "").rpartition(".")[2]
        name = module["module"].rpartition(".")[2] + (
            f".{own}" if own not in ("", "weight") else ""
        )
        key = (name, *(module[value] for value in ("kind", "rank", "alpha", "scale")))
        counts[key] = counts.get(key, 0) + 1
    names = ("modules", "kind", "rank", "alpha", "scale")
    return [dict(zip(names, key, strict=True)) | {"count": count} for key, count in counts.items()]


def _natural(name: str) -> list[tuple[int, int, str]]:
    """A sort key that counts layers as numbers."""
    return [
        (0, int(part), "") if part.isascii() and part.isdecimal() else (1, 0, part)
        for part in name.split(".")
    ]

"""The adapter_config.json of a written adapter: targets, ranks, scales, and what it takes over."""

import re
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

from adapterkit.adapters.record import Adapter, inside
from adapterkit.checkpoint.folder import Folder


def plain_settings() -> dict[str, Any]:
    """The config of a LoRA of scale 1, as PEFT writes it."""
    return {
        "peft_type": "LORA",
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "lora_bias": False,
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "exclude_modules": None,
    }


def targets(adapters: Sequence[Adapter], modules: list[str]) -> dict[str, Any]:
    """target_modules that mean the written modules and no others: the inputs' own list where all have the same modules and list,
    else their full names. Parameters are named as the inputs name them (`target_parameters`)."""
    named = {target for a in adapters for target in a.config.get("target_parameters") or []}
    if named:
        version = (
            {"peft_version": adapters[0].config["peft_version"]}
            if "peft_version" in adapters[0].config
            else {}
        )
        return {
            "target_modules": modules,
            "target_parameters": sorted(named),
            **version,
        }  # the layout of stacks goes by the version
    lists = [a.config.get("target_modules") for a in adapters]
    more = (
        "layers_to_transform",
        "exclude_modules",
        "ensure_weight_tying",
    )  # what else decides which modules a list means
    narrowed = any(a.config.get(key) for a in adapters for key in more)
    same = bool(adapters) and all(
        {a.attention(lora) or lora.module for lora in a.loras} == set(modules) for a in adapters
    )
    if (
        same
        and not narrowed
        and all(isinstance(t, list) and set(t) == set(lists[0] or ()) for t in lists)
    ):
        return {"target_modules": sorted(lists[0] or ())}
    return {"target_modules": modules}


def ranks(
    found: dict[str, int], alpha: float | None = None, unnamed: Collection[str] = ()
) -> dict[str, Any]:
    """r, lora_alpha and the patterns for each target's rank: the commonest is r, the others are anchored patterns.

    A pattern is held against a parameter's own name where that is the target; `unnamed` are modules of such parameters."""
    common = Counter(found.values()).most_common(1)[0][0] if found else 8
    name = lambda target: f"^{target}" + r"(\.\w+)?" * (target in unnamed)
    pattern = {name(target): rank for target, rank in found.items() if rank != common}
    alphas = (
        {"lora_alpha": common, "alpha_pattern": dict(pattern)}
        if alpha is None
        else {"lora_alpha": alpha, "alpha_pattern": {}}
    )
    return {"r": common, "rank_pattern": pattern, **alphas}


def task_type(config: dict, saved: Collection[str] = ()) -> str | None:
    """PEFT's task type for a model of this config; for classifiers only where the head is among the `saved` modules: by their type
    PEFT takes it for one, and looks for its weights."""
    names = " ".join(map(str, config.get("architectures") or ()))
    if "ForCausalLM" in names:
        return "CAUSAL_LM"
    known = {"ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS"}
    heads = {"classifier", "score"} & {module.rpartition(".")[2] for module in saved}
    return next((task for word, task in known.items() if word in names and heads), None)


def hub_id(folder: Folder) -> str | None:
    """The Hub's id of a folder, where it has one."""
    found = folder.origin.get("repo")
    return str(found) if found else None


def base_id(adapter: Adapter) -> str | None:
    """The base's id that an adapter's config names; a path of the machine it was trained on is of no use to others."""
    base = adapter.config.get("base_model_name_or_path")
    return (
        base
        if isinstance(base, str) and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base) and base[0] != "."
        else None
    )


def extras(adapters: Sequence[Adapter]) -> dict[str, Any]:
    """What the config must say of values taken over whole: trained modules, token rows, biases."""
    heads = {m for a in adapters for m in a.saved if any(inside(name, m) for name in a.replaced)}
    saved = sorted(heads.union(*(a.config.get("modules_to_save") or [] for a in adapters)))
    tokens = next((a.config["trainable_token_indices"] for a in adapters if a.tokens), None)
    biases = {a.config.get("bias", "none") for a in adapters} - {"none", None}
    found: dict[str, Any] = {
        "modules_to_save": saved or None,
        "bias": "all" if len(biases) > 1 else next(iter(biases), "none"),
    }
    return found | ({"trainable_token_indices": tokens} if tokens else {})


def flags(adapter: Adapter) -> dict[str, Any]:
    """The config's flags of what stays as it is beside new factors."""
    return {
        key: bool(adapter.config.get(key))
        for key in ("use_dora", "lora_bias", "ensure_weight_tying")
    }

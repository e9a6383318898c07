"""Create settings of an adapter_config.json as PEFT reads them, and read scales that such settings
declare elsewhere, for example in a file's metadata."""

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from adapterkit.core.adapter.config import PEFT_DEFAULTS, check_config
from adapterkit.core.adapter.record import Adapter, is_inside
from adapterkit.core.adapter.targets import Patterns
from adapterkit.core.checkpoint.folder import Folder
from adapterkit.core.errors import Problems
from adapterkit.core.records import Json, Settings

PEFT_LAYOUT = "0.19.0"  # the first PEFT that reads square experts in the layout written here
# PEFT's target_modules for an adapter of no module: an empty list is an error there
NO_MODULES = "dummy-target-modules"
HUB_ID = re.compile(r"(?!\.)[\w.-]+(/[\w.-]+)?")
PLAIN = (
    "peft_type", "inference_mode", "init_lora_weights", "lora_dropout", "bias", "use_rslora",
    "use_dora", "lora_bias", "modules_to_save", "layers_to_transform", "layers_pattern",
    "exclude_modules",
)  # fmt: skip
# settings besides target_modules that determine the modules of a list
NARROWING = ("layers_to_transform", "exclude_modules", "ensure_weight_tying")
CLASSIFIERS = {"ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS"}


def plain_settings() -> Json:
    """The settings of a LoRA of scale 1, as PEFT writes them."""
    return {key: PEFT_DEFAULTS[key] for key in PLAIN}


def target_settings(adapters: Sequence[Adapter], modules: list[str]) -> Json:
    """target_modules that match exactly these modules, and the adapters' own target_parameters.

    Modules have their full names, or the adapters' own list if all have one list that matches these
    modules."""
    parameters = {name for a in adapters for name in a.config.get("target_parameters") or []}
    if parameters:
        settings = {"target_modules": modules, "target_parameters": sorted(parameters)}
        version = adapters[0].config.get("peft_version")  # the layout of stacks depends on it
        has_version = "peft_version" in adapters[0].config
        return settings | ({"peft_version": version} if has_version else {})
    if adapters and all(
        {a.attention(lora) or lora.module for lora in a.loras} == set(modules) for a in adapters
    ):
        lists = [a.config.get("target_modules") for a in adapters]
        is_narrowed = any(a.config.get(key) for a in adapters for key in NARROWING)
        sets = {frozenset(one) if isinstance(one, list) else None for one in lists}
        if len(sets) == 1 and (names := sets.pop()) is not None and not is_narrowed:
            return {"target_modules": sorted(names)}
    return {"target_modules": modules}


def rank_settings(
    ranks: Mapping[str, int],
    alpha: float | Mapping[str, float] | None = None,
    unnamed: Collection[str] = (),
) -> Json:
    """r, lora_alpha and their patterns for each target's rank: the most frequent is r, the others
    are anchored patterns. `alpha`: one for all, or by target; without it every scale is 1.

    PEFT matches a pattern with a parameter's own name if that is the target; `unnamed` are modules
    of such parameters."""
    r, rank_pattern = _common_and_others(ranks, unnamed)
    if isinstance(alpha, float | int):
        lora_alpha, alpha_pattern = alpha, {}
    else:
        lora_alpha, alpha_pattern = _common_and_others(ranks if alpha is None else alpha, unnamed)
    return {
        "r": r,
        "rank_pattern": rank_pattern,
        "lora_alpha": lora_alpha,
        "alpha_pattern": alpha_pattern,
    }


def _common_and_others(values: Settings, unnamed: Collection[str]) -> tuple[Any, Json]:
    """The most frequent value, and patterns for the targets with other values."""
    common = Counter(values.values()).most_common(1)[0][0] if values else 8
    others = {
        f"^{target}" + r"(\.\w+)?" * (target in unnamed): value
        for target, value in values.items()
        if value != common
    }
    return common, others


def task_type(config: dict, saved: Collection[str] = ()) -> str | None:
    """PEFT's task type for a model of this config.

    Classifiers have one only if the head is among the `saved` modules, because with that type PEFT
    looks for its weights."""
    names = " ".join(map(str, config.get("architectures") or ()))
    if "ForCausalLM" in names:
        return "CAUSAL_LM"
    if not {"classifier", "score"} & {module.rpartition(".")[2] for module in saved}:
        return None
    return next((task for word, task in CLASSIFIERS.items() if word in names), None)


def hub_id(folder: Folder) -> str | None:
    """The Hub id of a folder, if it has one."""
    repo = folder.origin.get("repo")
    return str(repo) if repo else None


def base_id(adapter: Adapter) -> str | None:
    """The base's Hub id in an adapter's config; None for a local path of the training."""
    base = adapter.config.get("base_model_name_or_path")
    return base if isinstance(base, str) and HUB_ID.fullmatch(base) else None


def value_settings(adapters: Sequence[Adapter]) -> Json:
    """Settings for the adapters' fully trained values: modules, token rows, biases."""
    heads = {m for a in adapters for m in a.saved if any(is_inside(name, m) for name in a.replaced)}
    modules = heads.union(*(a.config.get("modules_to_save") or [] for a in adapters))
    biases = {a.config.get("bias", "none") for a in adapters} - {"none", None}
    settings: Json = {
        "modules_to_save": sorted(modules) or None,
        "bias": "all" if len(biases) > 1 else next(iter(biases), "none"),
    }
    tokens = next((a.config["trainable_token_indices"] for a in adapters if a.tokens), None)
    return settings | ({"trainable_token_indices": tokens} if tokens else {})


def flags(adapter: Adapter) -> dict[str, bool]:
    """The adapter's flags for properties that new factors do not change."""
    return {
        key: bool(adapter.config.get(key))
        for key in ("use_dora", "lora_bias", "ensure_weight_tying")
    }


class DeclaredScales:
    """alpha of each module by r, lora_alpha, their patterns, use_rslora: delta = alpha / r · b @ a.

    `Refused` if the settings have values that PEFT would not accept."""

    def __init__(self, settings: Settings, where: str):
        config = {"peft_type": "LORA", **settings}
        Problems(check_config(config, where)).raise_all()
        self.rank, self.alpha = config["r"], config["lora_alpha"]
        self.rslora = bool(config.get("use_rslora"))
        self.ranks = Patterns(config.get("rank_pattern") or {}, f"{where}: rank_pattern")
        self.alphas = Patterns(config.get("alpha_pattern") or {}, f"{where}: alpha_pattern")

    def alpha_of(self, module: str) -> tuple[int, float]:
        """Rank and alpha of a module; with use_rslora alpha · √r, which gives the same scale."""
        rank, alpha = self.ranks.value(module, self.rank), self.alphas.value(module, self.alpha)
        return rank, float(alpha * rank**0.5 if self.rslora else alpha)


def declared_settings(
    ranks: Mapping[str, int], alphas: Mapping[str, float], **settings: object
) -> Json:
    """The settings of a LoRA with these ranks and alphas by module."""
    numbers = {name: as_int(alpha) for name, alpha in alphas.items()}
    targets = {"target_modules": sorted(ranks)}
    return plain_settings() | targets | settings | rank_settings(ranks, numbers)


def as_int(value: float) -> float | int:
    """A whole number as an int, as in configs; beyond 2^53 a float cannot represent each
    integer."""
    return int(value) if float(value).is_integer() and abs(value) < 2**53 else value

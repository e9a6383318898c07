"""Checks of an adapter_config.json: types, unknown settings, patterns."""

import math
from collections.abc import Callable, Collection, Iterable

from adapterkit.errors import AdapterkitError, Refused, shown

# Settings of PEFT 0.21. Others are ignored when falsy, else refused: an unknown flag may mean
# unknown arithmetic.
KNOWN_SETTINGS = {
    "alora_invocation_tokens", "alpha_pattern", "arrow_config", "auto_mapping",
    "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying", "eva_config",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "kasa_config",
    "layer_replication", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha",
    "lora_bias", "lora_dropout", "lora_ga_config", "megatron_core", "modules_to_save",
    "monteclora_config", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern",
    "revision", "target_modules", "target_parameters", "task_type", "trainable_token_indices",
    "use_dora", "use_rslora", "velora_config", "runtime_config", "eps", "num_labels",
}  # fmt: skip
OTHER_ARITHMETIC = {
    "alora_invocation_tokens": (
        "an activated LoRA acts on the tokens after its invocation only: no weight equals it"
    ),
    "arrow_config": "an Arrow router picks experts for each token: no weight equals it",
    "kasa_config": "KaSA truncates the base and has a diagonal of its own",
    "use_qalora": "QALoRA pools the inputs before a",
    "use_bdlora": "BD-LoRA's factors are block-diagonal",
    "megatron_config": "Megatron layers have another layout",
}
# inits that subtract from, or quantize, the base
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "lora_ga", "loftq")
# of an init whose part is still in the base: the initial factors beside the adapter say which part
IMPLICIT = "implicit_"
OTHER_INITS = ("gaussian", "eva", "mica", "orthogonal", "default", "true", "false")
FLAGS = ("use_dora", "use_rslora", "lora_bias", "ensure_weight_tying")
TEXTS = ("task_type", "peft_version", "bias")
LISTS = ("modules_to_save", "target_parameters")
MAX_LAYERS = 100_000
# PEFT adds these to modules_to_save by task_type; a model has at most one of them
TASK_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def with_heads(modules: Iterable[str] | None, task_type: str | None) -> list[str]:
    """modules_to_save, and the heads that PEFT adds to it in memory by task_type."""
    return list(dict.fromkeys([*(modules or ()), *TASK_HEADS.get(task_type or "", ())]))


def saved_modules(config: dict) -> list[str]:
    """Modules trained in full, as an adapter_config.json says."""
    return with_heads(config.get("modules_to_save"), config.get("task_type"))


# (config, its file for messages) -> its errors
ConfigCheck = Callable[[dict, str], list[AdapterkitError]]


def check_config(config: dict, where: str) -> list[AdapterkitError]:
    """Errors of a LoRA's config: invalid values, unknown settings, other arithmetic than b @ a."""
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind.upper() != "LORA":
        hint = (
            "adapterkit resize makes a plain LoRA of the types that it knows; others cannot be "
            "read here"
        )
        return [Refused(f"peft_type {shown(repr(kind))}", expected="LORA", where=where, hint=hint)]
    errors: list[AdapterkitError] = []

    def refuse(key: str, expected: str) -> None:
        errors.append(invalid_setting(config, key, expected, where))

    errors += [
        Refused(
            f"{key} is set: {why}",
            expected="a plain or DoRA LoRA",
            where=where,
            hint="use this adapter with the library that trained it; it cannot be merged",
        )
        for key, why in OTHER_ARITHMETIC.items()
        if config.get(key)
    ]
    errors += check_unknown_settings(config, KNOWN_SETTINGS | set(OTHER_ARITHMETIC), where)
    init = config.get("init_lora_weights")
    name = init.lower() if isinstance(init, str) else ""
    is_known = name in OTHER_INITS or name.startswith((*BASE_CHANGING_INITS, IMPLICIT))
    if init is not None and type(init) is not bool and not is_known:
        inits = ", ".join(BASE_CHANGING_INITS + OTHER_INITS)
        refuse("init_lora_weights", f"true, false, or one of {inits}")
    # PEFT always writes both: a default here would be a guess at the scale
    if not is_number(config.get("r"), whole=True):
        refuse("r", "a whole number above 0")
    if not is_number(config.get("lora_alpha"), whole=False):
        refuse("lora_alpha", "a finite number")
    errors += check_types(config, where) + check_patterns(config, where)
    if not is_replication(config.get("layer_replication")):
        refuse("layer_replication", f"pairs [start, end) of at most {MAX_LAYERS:,} layers")
    return errors


def is_replication(value: object) -> bool:
    """Whether a layer_replication is None, or pairs of whole numbers of not too many layers."""
    if value is None:
        return True
    if not isinstance(value, list) or not all(isinstance(p, list) and len(p) == 2 for p in value):
        return False
    if not all(type(x) is int and x >= 0 for pair in value for x in pair):
        return False
    return sum(max(0, end - start) for start, end in value) <= MAX_LAYERS


def invalid_setting(config: dict, key: str, expected: str, where: str) -> Refused:
    return Refused(
        f"{key} = {shown(repr(config.get(key)))}",
        expected=expected,
        where=where,
        hint="fix the config",
    )


def check_unknown_settings(
    config: dict, known: Collection[str], where: str
) -> list[AdapterkitError]:
    """Refusals of settings that are not `known` and not falsy."""
    return [
        Refused(
            f"unknown setting {shown(key)} = {shown(repr(config[key]))}",
            expected="settings of PEFT 0.21 (an unknown one may mean other arithmetic)",
            where=where,
            hint="remove it from the config if it does not change the weights",
        )
        for key in sorted(set(config) - set(known))
        if config[key]
    ]


def check_types(config: dict, where: str) -> list[AdapterkitError]:
    """Refusals of flags, texts and lists (of all types of adapters) with values of another type."""
    errors: list[AdapterkitError] = [
        invalid_setting(config, k, "true or false", where)
        for k in FLAGS
        if not isinstance(config.get(k), bool | None)
    ]
    errors += [
        invalid_setting(config, k, "a text", where)
        for k in TEXTS
        if not isinstance(config.get(k), str | None)
    ]
    for key in LISTS:
        value = config.get(key)
        if value is not None and not (
            isinstance(value, list) and all(isinstance(v, str) and v for v in value)
        ):
            errors.append(invalid_setting(config, key, "a list of names", where))
    return errors


def check_patterns(config: dict, where: str) -> list[AdapterkitError]:
    """Refusals of rank_pattern and alpha_pattern with invalid values."""
    errors: list[AdapterkitError] = []
    for key in ("rank_pattern", "alpha_pattern"):
        table = config.get(key) or {}
        if not isinstance(table, dict) or not all(
            is_number(v, whole=key == "rank_pattern") for v in table.values()
        ):
            values = "whole numbers above 0" if key == "rank_pattern" else "finite numbers"
            errors.append(invalid_setting(config, key, f"a map of patterns to {values}", where))
    return errors


def is_number(value, *, whole: bool) -> bool:
    if whole:
        return type(value) is int and 0 < value < 2**31
    return type(value) in (int, float) and math.isfinite(value)

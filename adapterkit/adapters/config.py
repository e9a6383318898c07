"""Checks of an adapter_config.json: types, fields that PEFT would interpret otherwise, patterns."""

import math
from collections.abc import Callable, Collection

from adapterkit.errors import AdapterkitError, Refused, shown

# What PEFT 0.21 writes, and what each key means for arithmetic on the weights. A key that is not
# here changes nothing when it is falsy and is refused when it is not: an unknown flag may mean
# unknown arithmetic.
HARMLESS = {
    "alora_invocation_tokens", "alpha_pattern", "arrow_config", "auto_mapping", "base_model_name_or_path", "bias", "corda_config",
    "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights",
    "kasa_config", "layer_replication", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha", "lora_bias",
    "lora_dropout", "lora_ga_config", "megatron_core", "modules_to_save", "monteclora_config", "peft_type", "peft_version",
    "qalora_group_size", "r", "rank_pattern", "revision", "target_modules", "target_parameters", "task_type",
    "trainable_token_indices", "use_dora", "use_rslora", "velora_config", "runtime_config", "eps", "num_labels",
}  # fmt: skip
OTHER_ARITHMETIC = {
    "alora_invocation_tokens": (
        "an activated LoRA acts on the tokens after its invocation only: no weight equals it"
    ),
    "arrow_config": "an Arrow router picks experts for each token: no weight equals it",
    "kasa_config": "KaSA truncates the base and has a diagonal of its own",
    "use_qalora": "QALoRA pools the inputs before a",
    "use_bdlora": "BD-LoRA's factors are block-diagonal",
    "megatron_config": "Megatron layers are laid out in another way",
}
# inits that subtract from, or quantize, the base
CHANGED_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")
UNCHANGED_BASE = ("gaussian", "eva", "mica", "orthogonal", "default", "true", "false")
FLAGS = ("use_dora", "use_rslora", "lora_bias", "ensure_weight_tying")
TEXTS = ("task_type", "peft_version", "bias")
LISTS = ("modules_to_save", "target_parameters")
MOST_LAYERS = 100_000
# What PEFT adds to modules_to_save by task_type; a model has one of them, or none
TASK_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
# (config, where it stands) -> what is wrong with it
Check = Callable[[dict, str], list[AdapterkitError]]


def check_config(config: dict, where: str) -> list[AdapterkitError]:
    """Everything in an adapter's config that is out of range, unknown, or means other arithmetic
    than b @ a."""
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind.upper() != "LORA":
        hint = (
            "adapterkit resize makes a plain LoRA of the types that it knows; others cannot be "
            "read here"
        )
        return [Refused(f"peft_type {shown(repr(kind))}", expected="LORA", where=where, hint=hint)]
    errors: list[AdapterkitError] = []
    for key, why in OTHER_ARITHMETIC.items():
        if config.get(key):
            errors.append(
                Refused(
                    f"{key} is set: {why}",
                    expected="a plain or DoRA LoRA",
                    where=where,
                    hint="use this adapter with the library that trained it; it cannot be merged",
                )
            )
    errors += check_known(config, HARMLESS | set(OTHER_ARITHMETIC), where)
    init = config.get("init_lora_weights")
    name = init.lower() if isinstance(init, str) else ""
    if not (
        init is None
        or type(init) is bool
        or name in UNCHANGED_BASE
        or name.startswith(CHANGED_BASE)
    ):
        errors.append(
            unfit(
                config,
                "init_lora_weights",
                "true, false, or one of " + ", ".join(CHANGED_BASE + UNCHANGED_BASE),
                where,
            )
        )
    # PEFT always writes both: a default here would be a guess at the scale
    for key in ("r", "lora_alpha"):
        if not is_number(config.get(key), whole=key == "r"):
            errors.append(
                unfit(
                    config,
                    key,
                    "a whole number above 0" if key == "r" else "a finite number",
                    where,
                )
            )
    errors += check_types(config, where) + check_patterns(config, where)
    replication = config.get("layer_replication")
    if replication is not None and not (
        isinstance(replication, list)
        and all(
            isinstance(p, list) and len(p) == 2 and all(type(x) is int and x >= 0 for x in p)
            for p in replication
        )
        and sum(max(0, end - start) for start, end in replication) <= MOST_LAYERS
    ):
        errors.append(
            unfit(
                config,
                "layer_replication",
                f"pairs [start, end) of at most {MOST_LAYERS:,} layers",
                where,
            )
        )
    return errors


def unfit(config: dict, key: str, expected: str, where: str) -> Refused:
    return Refused(
        f"{key} = {shown(repr(config.get(key)))}",
        expected=expected,
        where=where,
        hint="fix the config",
    )


def check_known(config: dict, known: Collection[str], where: str) -> list[AdapterkitError]:
    """Settings that nobody here knows, and that are not off."""
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
    """Settings of all types that are flags, texts or lists, and are not."""
    errors: list[AdapterkitError] = [
        unfit(config, k, "true or false", where)
        for k in FLAGS
        if not isinstance(config.get(k), bool | None)
    ]
    errors += [
        unfit(config, k, "a text", where)
        for k in TEXTS
        if not isinstance(config.get(k), str | None)
    ]
    for key in LISTS:
        value = config.get(key)
        if value is not None and not (
            isinstance(value, list) and all(isinstance(v, str) and v for v in value)
        ):
            errors.append(unfit(config, key, "a list of names", where))
    return errors


def check_patterns(config: dict, where: str) -> list[AdapterkitError]:
    """Ranks and alphas by pattern that are none."""
    errors: list[AdapterkitError] = []
    for key in ("rank_pattern", "alpha_pattern"):
        table = config.get(key) or {}
        if not isinstance(table, dict) or not all(
            is_number(v, whole=key == "rank_pattern") for v in table.values()
        ):
            what = "whole numbers above 0" if key == "rank_pattern" else "finite numbers"
            errors.append(unfit(config, key, f"a map of patterns to {what}", where))
    return errors


def is_number(value, *, whole: bool) -> bool:
    if whole:
        return type(value) is int and 0 < value < 2**31
    return type(value) in (int, float) and math.isfinite(value)

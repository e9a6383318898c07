"""Check an adapter_config.json: types, unknown settings, patterns."""

from collections.abc import Callable, Collection, Iterable, Mapping

from adapterkit.core.commands import EXTRACT, PLAIN
from adapterkit.core.errors import AdapterkitError, Problems, Refused, shown
from adapterkit.core.records import (
    FINITE,
    FLAG,
    NAME,
    NON_NEGATIVE_INT,
    POSITIVE_INT,
    TEXT,
    Check,
    Json,
    also,
    list_of,
    optional,
    placed,
    table_of,
    test,
    values,
)
from adapterkit.core.registry import declarations, load
from adapterkit.doors import ADAPTERS

# order of the columns of a stack's b: see `expert_order`
ORDER, ORDER_DETAIL = "lora_B_layout", "unsloth_fused_expert_lora"
SLOWEST, FASTEST = ORDERS = ("grouped_by_expert", "rank_major")
# settings of other arithmetic than b @ a; those of the second line are standard factors in fewer
# numbers, which the formats complete
OTHER_ARITHMETIC = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "megatron_config",
    *(INCOMPLETE := ("use_qalora", "use_bdlora")),
)  # fmt: skip
# inits that subtract from, or quantize, the base
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "lora_ga", "loftq")
# an init whose factors are still in the base; the adapter's initial factors are stored with it
IMPLICIT = "implicit_"
CHANGED = "changed-by-"  # in `revision`, before the name of a change to the base
OTHER_INITS = ("gaussian", "eva", "mica", "orthogonal", "default", "true", "false")
MAX_LAYERS = 100_000
# what PEFT 0.21 writes for a plain LoRA
PEFT_DEFAULTS: Json = {
    "alora_invocation_tokens": None, "alpha_pattern": {}, "arrow_config": None,
    "auto_mapping": None, "base_model_name_or_path": None, "bias": "none", "corda_config": None,
    "ensure_weight_tying": False, "eva_config": None, "exclude_modules": None,
    "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True,
    "kasa_config": None, "layer_replication": None, "layers_pattern": None,
    "layers_to_transform": None, "loftq_config": {}, "lora_alpha": 8, "lora_bias": False,
    "lora_dropout": 0.0, "lora_ga_config": None, "megatron_config": None,
    "megatron_core": "megatron.core", "modules_to_save": None, "monteclora_config": None,
    "peft_type": "LORA", "peft_version": "0.21.2", "qalora_group_size": 16, "r": 8,
    "rank_pattern": {}, "revision": None, "target_modules": None, "target_parameters": None,
    "task_type": None, "trainable_token_indices": None, "use_bdlora": None, "use_dora": False,
    "use_qalora": False, "use_rslora": False, "velora_config": None,
}  # fmt: skip
# Settings of PEFT 0.21, and Unsloth's of stacks. Others are ignored when falsy, else refused: an
# unknown flag may change the arithmetic.
KNOWN_SETTINGS = {*PEFT_DEFAULTS, ORDER, ORDER_DETAIL, "runtime_config", "eps", "num_labels"}


def is_targets(value: object) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list | set) and all(isinstance(name, str) for name in value)
    )


# settings of all types of adapters
SHARED_SETTINGS: dict[str, Check] = {
    **dict.fromkeys(("use_dora", "use_rslora", "lora_bias", "ensure_weight_tying"), optional(FLAG)),
    **dict.fromkeys(("task_type", "peft_version", "bias", "revision"), optional(TEXT)),
    "base_model_name_or_path": optional(TEXT),
    "target_modules": optional(test("a text, or a list of names", is_targets)),
    **dict.fromkeys(
        ("modules_to_save", "target_parameters"), optional(list_of(NAME, "a list of names"))
    ),
}
PATTERNS = {
    "rank_pattern": optional(table_of(TEXT, POSITIVE_INT)),
    "alpha_pattern": optional(table_of(TEXT, FINITE)),
}
REPLICATION = also(
    list_of(list_of(NON_NEGATIVE_INT)),
    f"pairs [start, end) of at most {MAX_LAYERS:,} layers",
    lambda pairs: (
        all(len(pair) == 2 for pair in pairs)
        and sum(max(0, end - start) for start, end in pairs) <= MAX_LAYERS
    ),
)


def _is_init(value: object) -> bool:
    name = value.lower() if isinstance(value, str) else ""
    is_known = name in OTHER_INITS or name.startswith((*BASE_CHANGING_INITS, IMPLICIT))
    return type(value) is bool or is_known


LORA_SETTINGS: dict[str, Check] = {
    # PEFT always writes both, and a default would be a guess of the scale
    "r": POSITIVE_INT,
    "lora_alpha": FINITE,
    "init_lora_weights": optional(
        test(f"true, false, or one of {', '.join(BASE_CHANGING_INITS + OTHER_INITS)}", _is_init)
    ),
    "layer_replication": optional(REPLICATION),
    **SHARED_SETTINGS,
    **PATTERNS,
}
# PEFT adds these to modules_to_save by task_type; a model has at most one of them
TASK_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def with_heads(modules: Iterable[str] | None, task_type: str | None) -> list[str]:
    """modules_to_save, and the heads that PEFT adds to it in memory by task_type."""
    return list(dict.fromkeys([*(modules or ()), *TASK_HEADS.get(task_type or "", ())]))


# PEFT's types that train the prompt, or activations between layers
WITHOUT_WEIGHTS = (
    "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT",
    "ADAPTION_PROMPT", "CARTRIDGE",
)  # fmt: skip

# (config, its file for messages) -> its errors
ConfigCheck = Callable[[dict, str], list[AdapterkitError]]


def check_config(config: dict, where: str) -> list[AdapterkitError]:
    """Errors of a LoRA's config: invalid values, unknown settings, other arithmetic than b @ a."""
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind.upper() != "LORA":
        return [unmergeable_type(kind, "LORA", where)]
    errors = Problems()
    for key in filter(config.get, OTHER_ARITHMETIC):
        errors.append(load(ADAPTERS["other arithmetic"])(key, where))
    errors += check_unknown_settings(config, KNOWN_SETTINGS, where)
    tables = [one for one in (config, config.get("auto_mapping")) if isinstance(one, dict)]
    if any({ORDER, ORDER_DETAIL} & table.keys() for table in tables):
        errors += load(ADAPTERS["expert order words"])(config, where)
    return errors + check_settings(LORA_SETTINGS, config, where)


def unmergeable_type(kind: object, expected: str, where: str) -> Refused:
    """The refusal of an adapter's peft_type."""
    name = kind.upper() if isinstance(kind, str) else ""
    problem, hint = f"peft_type {shown(repr(kind))}", f"if it can be merged, {EXTRACT}"
    if name in WITHOUT_WEIGHTS:
        problem += ": it changes no weights and cannot be merged"
        expected, hint = "an adapter of weights, such as LoRA", "use it with PEFT"
    elif name.lower() in declarations("kinds"):
        hint = PLAIN
    return Refused(problem, expected=expected, where=where, hint=hint, code="AK301")


def check_live_config(config: dict, where: str) -> list[AdapterkitError]:
    """Errors of an adapter's config for a live model, where an activated LoRA works."""
    return check_config(config | {"alora_invocation_tokens": None}, where)


def check_settings(checks: Mapping[str, Check], config: dict, where: str) -> list[AdapterkitError]:
    """Errors of the settings that have a check."""
    errors = Problems()
    values(checks, config, errors)
    return placed(errors, where, hint="fix the config")


def invalid_setting(config: dict, key: str, expected: str, where: str) -> Refused:
    return Refused(
        f"{key} = {shown(repr(config.get(key)))}",
        expected=expected,
        where=where,
        hint="fix the config",
        code="AK301",
    )


def check_unknown_settings(
    config: dict, known: Collection[str], where: str
) -> list[AdapterkitError]:
    """Refusals of settings that are not `known` and not falsy."""
    hint = "remove it from the config if it does not change the weights"
    errors = Problems(where=where, hint=hint, code="AK301")
    for key in filter(config.get, sorted(set(config) - set(known))):
        errors.add(
            f"unknown setting {shown(key)} = {shown(repr(config[key]))}",
            "settings of PEFT 0.21 (an unknown one may mean other arithmetic)",
        )
    return errors

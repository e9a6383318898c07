"""Options of an init in a LoraConfig, and where an adapter_config.json of PEFT has them."""

from collections.abc import Iterator, Mapping
from typing import Any

from adapterkit.errors import Refused, did_you_mean, shown
from adapterkit.registry import declarations

# init -> PEFT's setting with its options
PEFT_CONFIGS = {"corda": "corda_config", "eva": "eva_config", "lora_ga": "lora_ga_config"}
# PEFT's options of how statistics are collected, which `collect` and `adapterkit stats` take
COLLECTING = {
    "corda": {
        "cache_file", "covariance_file", "prune_temporary_fields", "use_float16_for_covariance",
        "verbose",
    },
    "eva": {"label_mask_value", "tau", "use_label_mask"},
}  # fmt: skip


def option_errors(init: str | bool, options: Mapping[str, Any], where: str) -> Iterator[Refused]:
    """Refusals of options that an init does not have."""
    declared = declarations("inits").get("random" if init is False else str(init))
    known = () if declared is None else declared.options
    unknown = sorted(options.keys() - set(known))
    if unknown:
        yield Refused(
            f"init {init}: unknown options {', '.join(map(shown, unknown))}",
            expected=", ".join(known) or "no options",
            where=where,
            hint=did_you_mean(unknown, known) or "remove them",
        )


def options_to_peft(init: str | bool, options: Mapping[str, Any]) -> dict[str, Any]:
    """PEFT's settings for an init with options; none where PEFT has none."""
    if init == "pissa" and options.get("niter") is not None:
        return {"init_lora_weights": f"pissa_niter_{options['niter']}"}
    if init in PEFT_CONFIGS and options:
        return {PEFT_CONFIGS[str(init)]: dict(options)}
    return {}


def options_of_peft(init: object, config: Mapping[str, Any]) -> dict[str, Any]:
    """The options of an init in an adapter_config.json."""
    options = config.get(PEFT_CONFIGS.get(init, "")) if isinstance(init, str) else None
    if not isinstance(options, Mapping):
        return {}
    ignored = COLLECTING.get(str(init), set())
    return {name: value for name, value in options.items() if name not in ignored}

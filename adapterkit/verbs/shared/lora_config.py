"""LoraConfig: the settings of a LoRA that is attached to a model, and its adapter_config.json."""

import copy
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, fields, replace
from typing import Any

from adapterkit.core.adapter.adapter_config import NO_MODULES
from adapterkit.core.adapter.config import (
    BASE_CHANGING_INITS,
    IMPLICIT,
    OTHER_INITS,
    PEFT_DEFAULTS,
    REPLICATION,
    check_live_config,
    invalid_setting,
    with_heads,
)
from adapterkit.core.adapter.targets import ALL_LINEAR
from adapterkit.core.errors import Problems, Refused, did_you_mean, shown
from adapterkit.core.patterns import matcher
from adapterkit.core.records import (
    ANYTHING,
    FINITE,
    NAME,
    NON_NEGATIVE_INT,
    POSITIVE_INT,
    Check,
    Json,
    Settings,
    also,
    checked_field,
    checks_of,
    list_of,
    one_of,
    one_or_several,
    optional,
    placed,
    table_of,
    test,
    values,
)
from adapterkit.core.registry import declarations

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


def option_errors(init: str | bool, options: Settings, where: str) -> Iterator[Refused]:
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
            code="AK301",
        )


def options_to_peft(init: str | bool, options: Settings) -> Json:
    """PEFT's settings for an init with options; empty if PEFT has none."""
    if init == "pissa" and options.get("niter") is not None:
        return {"init_lora_weights": f"pissa_niter_{options['niter']}"}
    if init in PEFT_CONFIGS and options:
        return {PEFT_CONFIGS[str(init)]: dict(options)}
    return {}


def options_of_peft(init: object, config: Settings) -> Json:
    """The options of an init in an adapter_config.json."""
    options = config.get(PEFT_CONFIGS.get(init, "")) if isinstance(init, str) else None
    if not isinstance(options, Mapping):
        return {}
    ignored = COLLECTING.get(str(init), set())
    return {name: value for name, value in options.items() if name not in ignored}


# field -> PEFT's name, if different
PEFT_NAMES = {
    "rank": "r", "alpha": "lora_alpha", "targets": "target_modules", "rslora": "use_rslora",
    "dora": "use_dora", "dropout": "lora_dropout", "init": "init_lora_weights",
    "exclude": "exclude_modules", "layers": "layers_to_transform",
    "parameters": "target_parameters", "trainable_tokens": "trainable_token_indices",
    "tie": "ensure_weight_tying", "invocation_tokens": "alora_invocation_tokens",
}  # fmt: skip
# settings of how PEFT trains that have no counterpart here
ONLY_PEFT = {
    "loftq_config": "none: `adapterkit loftq` takes these options, and writes what `load` trains",
    "monteclora_config": "none: only PEFT has MonteCLoRA's noise",
    "velora_config": "none: only PEFT has VeLoRA's compressed activations",
}
OUR_NAMES = {theirs: ours for ours, theirs in PEFT_NAMES.items()}
OUR_NAMES |= dict.fromkeys(PEFT_CONFIGS.values(), "init_options")
TASK_TYPES = (
    "SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION",
)  # fmt: skip
BIASES = ("none", "all", "lora_only")
PEFT_INITS = tuple(
    name for name in BASE_CHANGING_INITS + OTHER_INITS if name not in ("true", "false")
)


def _distinct(check: Check, expected: str) -> Check:
    """Check a list with distinct items."""
    return Check(expected, lambda value: tuple(dict.fromkeys(check.read(value))))


def _unless_empty(check: Check) -> Check:
    """Check the same, with None for an empty list."""
    is_none = lambda value: value is None or value in ("", [], (), set())
    return replace(check, read=lambda value: None if is_none(value) else check.read(value))


def _is_init(value: object) -> str | bool:
    name = value.lower() if isinstance(value, str) else ""
    if value is not False and not _is_of_peft(name) and name not in declarations("inits"):
        raise ValueError
    return name or False


def _regex(value: Any) -> str:
    matcher(NAME.read(value), "")
    return value


def _targets(value: object) -> str | tuple[str, ...]:
    if isinstance(value, str):
        return ALL_LINEAR if value.lower() == ALL_LINEAR else _regex(value)
    return NAMES.read(value)


def _tokens(value: object) -> tuple[int, ...] | dict[str, tuple[int, ...]]:
    if not isinstance(value, Mapping):
        return INDICES.read(value)
    return also(table_of(NAME, INDICES), "", len).read(value)


REGEX = Check("a regular expression", _regex)
NAMES = _distinct(list_of(NAME), "a list of names")
NAMES_OR_REGEX = Check("a list of names, or a regular expression", _targets)
INDICES = also(
    list_of(NON_NEGATIVE_INT), "different token ids", lambda ids: ids and len({*ids}) == len(ids)
)
PAIRS = also(
    REPLICATION,
    "pairs (start, end) of whole numbers, start < end",
    lambda pairs: all(start < end for start, end in pairs),
)
OPTION = test(
    "a text, a number, true or false",
    lambda value: isinstance(value, str | bool) or FINITE.fits(value),
)


@dataclass(frozen=True)
class LoraConfig:
    """delta = scale * b @ a on each target; scale = alpha / rank, with `rslora` alpha / √rank.

    `targets`: "all-linear", ends of modules' names, a regular expression for the whole name, or
    None for the default of the model's type; `parameters`: ends of parameters' names. `init`: a
    method's name, or False, both factors random; `init_options`: the method's options by PEFT's
    names, for example {"rho": 2.0} for eva. Lists become tuples. Raises `Refused` with all invalid
    settings; for PEFT's names it names the new ones.

    The settings are PEFT 0.21's (LoRA: arXiv:2106.09685)."""

    rank: int = checked_field(8, POSITIVE_INT)
    alpha: float = 8
    targets: str | Sequence[str] | None = checked_field(
        None, optional(replace(NAMES_OR_REGEX, expected=f"{ALL_LINEAR}, {NAMES_OR_REGEX.expected}"))
    )
    _: KW_ONLY
    rslora: bool = False
    dora: bool = False
    dropout: float = checked_field(
        0.0, also(FINITE, "a number from 0, below 1", lambda value: 0 <= value < 1)
    )
    bias: str = checked_field("none", one_of(*BIASES))
    lora_bias: bool = False
    init: str | bool = checked_field(
        "default", Check(f"false, or one of {', '.join(PEFT_INITS)}", _is_init)
    )
    init_options: Mapping[str, Any] = checked_field({}, table_of(NAME, OPTION))
    rank_pattern: Mapping[str, int] = checked_field({}, table_of(REGEX, POSITIVE_INT))
    alpha_pattern: Mapping[str, float] = checked_field({}, table_of(REGEX, FINITE))
    exclude: str | Sequence[str] | None = checked_field(None, _unless_empty(NAMES_OR_REGEX))
    layers: int | Sequence[int] | None = checked_field(
        None, _unless_empty(one_or_several(NON_NEGATIVE_INT))
    )
    layers_pattern: str | Sequence[str] | None = checked_field(
        None, _unless_empty(_distinct(one_or_several(REGEX), "names of lists of layers"))
    )
    parameters: Sequence[str] | None = checked_field(None, _unless_empty(NAMES))
    modules_to_save: Sequence[str] | None = checked_field(None, _unless_empty(NAMES))
    trainable_tokens: Sequence[int] | Mapping[str, Sequence[int]] | None = checked_field(
        None, optional(Check("different token ids, or a map of embeddings to them", _tokens))
    )
    tie: bool = False
    layer_replication: Sequence[Sequence[int]] | None = checked_field(None, optional(PAIRS))
    invocation_tokens: Sequence[int] | None = checked_field(
        None, optional(also(list_of(NON_NEGATIVE_INT), "token ids", len))
    )
    task_type: str | None = checked_field(None, optional(one_of(*TASK_TYPES)))

    # before __init__, which knows no other names
    def __new__(cls, *args: object, **kwargs: object):
        known = [f.name for f in fields(cls)]
        Problems([_unknown(name, known) for name in kwargs if name not in known]).raise_all()
        return super().__new__(cls)

    def __post_init__(self) -> None:
        settings = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, value in _checked(settings, "LoraConfig").items():
            object.__setattr__(self, name, value)

    @property
    def saved(self) -> list[str]:
        """Fully trained modules: modules_to_save and the heads that the task adds."""
        return with_heads(self.modules_to_save, self.task_type)

    def to_peft(self, base_model_name_or_path: str | None = None) -> Json:
        """The adapter_config.json. Inits that PEFT does not know, or cannot repeat on loading
        (loftq), are written as its default, because the factors are in the file."""
        own = {
            PEFT_NAMES.get(f.name, f.name): _as_json(getattr(self, f.name))
            for f in fields(self)
            if f.name != "init_options"
        }
        own |= options_to_peft(self.init, self.init_options)
        is_repeatable = _is_of_peft(str(self.init)) and self.init not in ("default", "loftq")
        if isinstance(self.init, str) and not is_repeatable:
            own["init_lora_weights"] = True
        if self.targets == () and not self.parameters:
            own["target_modules"] = NO_MODULES
        base = {"base_model_name_or_path": base_model_name_or_path}
        return copy.deepcopy(PEFT_DEFAULTS) | own | base

    @classmethod
    def from_peft(cls, config: Settings, where: str) -> "LoraConfig":
        """The settings in an adapter_config.json, whose path is `where`; `Refused` with all unknown
        or invalid ones."""
        config = dict(config)
        errors = Problems(check_live_config(config, where))
        settings = {}
        for f in fields(cls):
            value = config.get(PEFT_NAMES.get(f.name, f.name))
            is_empty = value is None or (isinstance(value, str | list | dict) and not value)
            if not is_empty or (f.name == "targets" and value == []):
                settings[f.name] = value
        if settings.get("targets") == NO_MODULES:
            settings["targets"] = []
        if "init" in settings:
            init = settings["init"]
            init = init.lower().removeprefix(IMPLICIT) if isinstance(init, str) else init
            words = {"true": "default", True: "default", "false": False}
            settings["init"] = words.get(init, init)
            settings["init_options"] = options_of_peft(settings["init"], config)
        with errors.collected():
            settings = _checked(settings, where, PEFT_NAMES)
        errors.raise_all()
        return cls(**settings)

    @classmethod
    def of(cls, config: object) -> "LoraConfig":
        """A config for a new adapter from one of PEFT, or from a map of settings by our names or by
        PEFT's, as in its JSON; `Refused` for anything else, and for settings that only PEFT can
        train."""
        if isinstance(config, cls):
            return config
        settings = config
        if hasattr(config, "peft_type") and callable(to_dict := getattr(config, "to_dict", None)):
            settings = to_dict()
        if not isinstance(settings, Mapping) or not all(isinstance(key, str) for key in settings):
            kind = type(config).__name__
            expected = "a LoraConfig of adapterkit or PEFT, or a map of settings"
            raise Refused(
                f"config of type {kind}", expected=expected, where="LoraConfig", code="AK301"
            )
        known = checks_of(cls)
        if not any(key in PEFT_DEFAULTS and key not in known for key in settings):
            return cls(**settings)
        where = "PEFT's LoraConfig"
        Problems(
            [
                invalid_setting({key: settings[key]}, key, expected, where)
                for key, expected in ONLY_PEFT.items()
                if settings.get(key)
            ]
        ).raise_all()
        lists = {
            key: list(list_of(ANYTHING).read(value))
            for key, value in settings.items()
            if isinstance(value, tuple | set | frozenset)
        }
        return cls.from_peft(PEFT_DEFAULTS | dict(settings) | lists, where)


def _unknown(name: str, known: Sequence[str]) -> Refused:
    """The refusal of an argument that LoraConfig does not have."""
    where, problem = "LoraConfig", f"PEFT's setting {shown(name)}"
    if name in OUR_NAMES:
        ours = OUR_NAMES[name]
        return Refused(
            problem, expected=ours, where=where, hint=f"write {ours} for {name}", code="AK301"
        )
    hint = "remove it"
    if name == "fan_in_fan_out":
        hint = "remove it: the layer's class determines how its weight is stored"
    elif name == "loftq_config":
        hint = "`adapterkit loftq` takes these options"
    elif name not in PEFT_DEFAULTS:
        hint = did_you_mean([name], known) or hint
        problem = f"unknown setting {shown(name)}"
    return Refused(problem, expected=", ".join(known), where=where, hint=hint, code="AK301")


def _as_json(value: object) -> Any:
    if isinstance(value, tuple):
        return [_as_json(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _as_json(item) for key, item in value.items()}
    return value


def _is_of_peft(init: str) -> bool:
    return init in PEFT_INITS or re.fullmatch(r"pissa_niter_\d+", init) is not None


def _checked(settings: Settings, where: str, names: Mapping[str, str] | None = None) -> Json:
    """The settings as the fields store them; `Refused` with all invalid ones, by their `names` in
    the file `where`."""
    names = names or {}
    wrong = Problems()
    checks = checks_of(LoraConfig)
    found = values({key: checks[key] for key in settings}, settings, wrong)
    errors = placed(wrong, where, hint="fix the config", name=lambda key: names.get(key, key))
    errors += _conflicts(found, settings.keys() - found.keys(), names, where)
    Problems(errors).raise_all()
    return found


# settings that exclude each other, and why
EXCLUSIVE = (
    ("parameters", "dora", "DoRA scales the rows of a linear layer, embedding or convolution"),
    ("parameters", "lora_bias", "b of a parameter has no output to add a bias to"),
    ("parameters", "dropout", "a parameter has no input to drop"),
    ("parameters", "invocation_tokens", "a parameter is the same for all tokens"),
    ("dora", "lora_bias", "remove lora_bias"),
    ("dora", "invocation_tokens", "DoRA scales the base's output, which stays as it is before"),
)


def _conflicts(
    settings: Settings, invalid: Collection[str], names: Mapping[str, str], where: str
) -> Iterator[Refused]:
    """Yield refusals of valid settings that contradict each other."""

    get = settings.get

    def conflict(*keys: str, expected: str, hint: str) -> Refused:
        problem = " and ".join(f"{names.get(k, k)} = {shown(repr(get(k)))}" for k in keys)
        return Refused(problem, expected=expected, where=where, hint=hint, code="AK301")

    for first, second, reason in EXCLUSIVE:
        if get(first) and get(second):
            yield conflict(first, second, expected="one of them", hint=reason)
    for key in ("layers", "layers_pattern"):
        if get(key) and isinstance(get("targets"), str):
            hint = "name the layers in the regular expression, or give a list of names"
            yield conflict("targets", key, expected="a list of names as targets", hint=hint)
    if get("layers_pattern") and not get("layers") and "layers" not in invalid:
        expected, hint = "layers with layers_pattern", "give layers, or remove it"
        yield conflict("layers_pattern", "layers", expected=expected, hint=hint)
    if get("lora_bias") and get("init", "default") not in ("default", False):
        hint = "no other init sets the bias"
        yield conflict("lora_bias", "init", expected="the default init", hint=hint)
    if "init" not in invalid:
        yield from option_errors(get("init", "default"), get("init_options") or {}, where)
    others = ("parameters", "modules_to_save", "trainable_tokens")
    if get("targets") == () and not any(map(get, others)) and get("bias", "none") == "none":
        hint = "give targets"
        yield conflict("targets", expected="something to train", hint=hint)

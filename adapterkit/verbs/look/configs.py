"""Compare two configs, and decide which differences change the weights' effect."""

import json
import math
from collections.abc import Iterator
from typing import Any

from adapterkit.core.adapter.record import Adapter
from adapterkit.core.records import Json
from adapterkit.core.weights.safe_config import closed, safe_config

# Model settings about how the model was saved or is run: not compared
IGNORED = {
    "_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_diffusers_version",
    "_name_or_path", "attn_implementation", "chunk_size_feed_forward", "gradient_checkpointing",
    "name_or_path", "output_attentions", "output_hidden_states", "return_dict", "torchscript",
    "transformers_version", "use_cache",
}  # fmt: skip
# Model settings that are reported and do not count: a rounded copy is the same, the others act in
# training only, or are names. So are settings whose name has one of `DROPOUTS`.
NO_EFFECT = {
    "dtype", "torch_dtype", "id2label", "label2id", "initializer_factor", "initializer_range",
    "num_labels", "problem_type",
}  # fmt: skip
DROPOUTS = ("dropout", "pdrop", "layerdrop", "drop_path")
# Adapter settings about how it was trained and saved: not compared
ADAPTER_IGNORED = {
    "auto_mapping", "inference_mode", "megatron_core", "peft_type", "peft_version",
    "runtime_config",
}  # fmt: skip
# Adapter settings that count: the effect of all others is in the tensors that are compared (scales,
# magnitudes, biases, which modules there are)
ADAPTER_AFFECTS_WEIGHTS = {"ensure_weight_tying", "layer_replication", "target_parameters"}


def compare_model_configs(a: dict, b: dict) -> tuple[list[Json], list[str]]:
    """Rows and notes on two models' configs; all settings count except dropouts and `NO_EFFECT`."""
    no_effect = _differences(_select(a, no_effect=True), _select(b, no_effect=True))
    a, b = _select(a, no_effect=False), _select(b, no_effect=False)
    rows, notes = list(_differences(a, b)), []
    if any(row["change"] != "changed" for row in rows):
        filled = _with_defaults(a, b)
        if filled is not None:
            a, b, note = filled
            a, b = _select(a, no_effect=False), _select(b, no_effect=False)
            rows, notes = list(_differences(a, b)), [note]
    counting = [row | {"decides": True} for row in rows]
    return counting + [row | {"decides": False} for row in no_effect], notes


def compare_adapter_configs(a: Adapter, b: Adapter) -> list[Json]:
    """Rows on two adapters' configs; absent, false and empty are equal, and lists of names have no
    order."""

    def plain(value: Any) -> Any:
        names = isinstance(value, list) and all(isinstance(v, str) for v in value)
        return (sorted(value) if names else value) or None

    counting = set(ADAPTER_AFFECTS_WEIGHTS)
    if a.changed_base() != b.changed_base():
        counting.add("init_lora_weights")
    differing = [
        key
        for key in {**a.config, **b.config}
        if key not in ADAPTER_IGNORED
        and not _equal(plain(a.config.get(key)), plain(b.config.get(key)))
    ]
    rows = [_row(key, key, a.config, b.config) | {"decides": key in counting} for key in differing]
    return sorted(rows, key=lambda row: not row["decides"])


def _select(config: dict, *, no_effect: bool) -> dict:
    """The compared settings, including nested ones: those without effect, or all others."""
    selected = {}
    for key, value in config.items():
        if isinstance(value, dict) and key not in NO_EFFECT:
            nested = _select(value, no_effect=no_effect)
            if nested or not (value or no_effect):
                selected[key] = nested
        elif key not in IGNORED and no_effect == (
            key in NO_EFFECT or any(word in key for word in DROPOUTS)
        ):
            selected[key] = value
    return selected


def _differences(a: dict, b: dict, prefix: str = "") -> Iterator[Json]:
    """Yield a row for each setting that differs; nested ones have dotted names."""
    for key in {**a, **b}:
        one, other = a.get(key), b.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            yield from _differences(one, other, f"{prefix}{key}.")
        elif key not in a or key not in b or not _equal(one, other):
            yield _row(prefix + key, key, a, b)


def _row(name: str, key: str, a: dict, b: dict) -> Json:
    change = "added" if key not in a else "removed" if key not in b else "changed"
    values = {"a": printable(a.get(key)), "b": printable(b.get(key))}
    return {"name": printable(name), "change": change, **values}


def _equal(a: object, b: object) -> bool:
    return a == b or repr(a) == repr(b)  # NaN equals NaN


def _with_defaults(a: dict, b: dict) -> tuple[dict, dict, str] | None:
    """Both configs as transformers completes them (defaults, renamed settings), and a note; None if
    it does not know the model."""
    model_type = a.get("model_type")
    if model_type is None or b.get("model_type") != model_type:
        return None
    if '"backbone"' in json.dumps([a, b]):  # a name that the model's class would look up on the Hub
        return None
    import transformers

    if model_type not in transformers.CONFIG_MAPPING:
        return None
    make = transformers.CONFIG_MAPPING[model_type]
    fill = lambda all, safe: make(**safe).to_dict() | {k: all[k] for k in all if k not in safe}
    try:
        with closed():
            one, other = (fill(config, safe_config(config)) for config in (a, b))
    except Exception:  # a model's class may refuse values in any way: they are compared as stored
        return None
    note = f"settings that a config.json leaves out are {model_type}'s defaults in transformers "
    return one, other, note + transformers.__version__


def printable(value: object) -> Any:
    """A JSON value with printable texts and finite numbers (else None)."""
    if isinstance(value, dict):
        return {printable(str(key)): printable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [printable(item) for item in value]
    if isinstance(value, str):
        return "".join(
            c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode()
            for c in value
        )
    return value if not isinstance(value, float) or math.isfinite(value) else None

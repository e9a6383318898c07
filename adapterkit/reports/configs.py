"""Settings of configs: which of two configs differ, and which of those change what the weights do."""

import json
import math
from collections.abc import Iterator
from typing import Any

from adapterkit.adapters.record import Adapter

# Said of a model by whoever saved it, or of how it is run: not compared
UNSAID = {
    "_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_diffusers_version", "_name_or_path",
    "attn_implementation", "chunk_size_feed_forward", "gradient_checkpointing", "name_or_path", "output_attentions",
    "output_hidden_states", "return_dict", "torchscript", "transformers_version", "use_cache",
}  # fmt: skip
# Told of a model where they differ: rounded copies are the same, the others matter in training, or are names
IDLE = {
    "dtype",
    "torch_dtype",
    "id2label",
    "label2id",
    "initializer_factor",
    "initializer_range",
    "num_labels",
    "problem_type",
}
DROPOUTS = ("dropout", "pdrop", "layerdrop", "drop_path")
# Of an adapter: how it was trained and saved
ADAPTER_UNSAID = {
    "auto_mapping",
    "inference_mode",
    "megatron_core",
    "peft_type",
    "peft_version",
    "runtime_config",
}
# What an adapter's settings do to its tensors is compared (scales, magnitudes, biases, which modules there are): these do more
ADAPTER_DECIDES = {"ensure_weight_tying", "layer_replication", "target_parameters"}


def of_models(a: dict, b: dict) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows and notes on two models' configs. All settings count but `IDLE` ones and dropouts."""
    idle = _rows(_chosen(a, idle=True), _chosen(b, idle=True))
    a, b = _chosen(a, idle=False), _chosen(b, idle=False)
    rows, notes = list(_rows(a, b)), []
    if any(row["change"] != "changed" for row in rows):
        filled = _with_defaults(a, b)
        if filled is not None:
            a, b, note = filled
            rows, notes = list(_rows(_chosen(a, idle=False), _chosen(b, idle=False))), [note]
    return [row | {"decides": True} for row in rows] + [
        row | {"decides": False} for row in idle
    ], notes


def of_adapters(a: Adapter, b: Adapter) -> list[dict[str, Any]]:
    """Rows on two adapters' configs; what is absent, false or empty is the same, and lists of names have no order."""

    def plain(value: Any) -> Any:
        names = isinstance(value, list) and all(isinstance(v, str) for v in value)
        return (sorted(value) if names else value) or None

    decides = ADAPTER_DECIDES | (
        {"init_lora_weights"} if a.changed_base() != b.changed_base() else set()
    )
    keys = [key for key in {**a.config, **b.config} if key not in ADAPTER_UNSAID]
    differing = [
        key for key in keys if not _equal(plain(a.config.get(key)), plain(b.config.get(key)))
    ]
    rows = [_row(key, key, a.config, b.config) | {"decides": key in decides} for key in differing]
    return sorted(rows, key=lambda row: not row["decides"])


def _chosen(config: dict, *, idle: bool) -> dict:
    """The settings that are compared, those of sub-configs too: the idle ones, or all others."""
    found = {}
    for key, value in config.items():
        if isinstance(value, dict) and key not in IDLE:
            inside = _chosen(value, idle=idle)
            if inside or not (value or idle):
                found[key] = inside
        elif key not in UNSAID and idle == (key in IDLE or any(word in key for word in DROPOUTS)):
            found[key] = value
    return found


def _rows(a: dict, b: dict, prefix: str = "") -> Iterator[dict[str, Any]]:
    """The settings that differ, a sub-config's by their dotted names."""
    for key in {**a, **b}:
        one, other = a.get(key), b.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            yield from _rows(one, other, f"{prefix}{key}.")
        elif key not in a or key not in b or not _equal(one, other):
            yield _row(prefix + key, key, a, b)


def _row(name: str, key: str, a: dict, b: dict) -> dict[str, Any]:
    change = "added" if key not in a else "removed" if key not in b else "changed"
    return {
        "name": printable(name),
        "change": change,
        "a": printable(a.get(key)),
        "b": printable(b.get(key)),
    }


def _equal(a: Any, b: Any) -> bool:
    return a == b or repr(a) == repr(b)  # NaN is what NaN is


def _with_defaults(a: dict, b: dict) -> tuple[dict, dict, str] | None:
    """Both configs with what they leave out, as transformers fills it in, and its old names renewed, and a note on it; None where
    it does not know the model."""
    kind = a.get("model_type")
    if kind is None or b.get("model_type") != kind:
        return None
    if '"backbone"' in json.dumps([a, b]):  # a name that the model's class would look up on the Hub
        return None
    import transformers

    if kind not in transformers.CONFIG_MAPPING:
        return None
    try:
        one, other = (transformers.CONFIG_MAPPING[kind](**config).to_dict() for config in (a, b))
    except (
        Exception
    ):  # a model's class may refuse values in any way: they are compared as they stand
        return None
    return (
        one,
        other,
        f"settings that a config.json leaves out are {kind}'s defaults in transformers {transformers.__version__}",
    )


def printable(value: Any) -> Any:
    """A value from a stranger's JSON, its texts printable and its numbers finite."""
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

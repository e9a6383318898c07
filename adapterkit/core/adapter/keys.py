"""PEFT's names of files and keys; they are defined in this folder only."""

import re
from collections.abc import Collection, Mapping

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ADDED_DELTAS = "added_deltas.safetensors"  # deltas that are no factors, converted for a merge
INITIAL = "initial"  # subfolder of an adapter: the adapter before its training
PREFIX = "base_model.model."
FACTORS = {  # by the kind of the module, a and b
    "module": ("lora_A.weight", "lora_B.weight"),
    "embedding": ("lora_embedding_A", "lora_embedding_B"),
}
# keys that only PEFT's own layout has: no experts, which it stores in several ways, no factors with
# the name of an adapter, as in a trainer's state, and no keys of other types
PLAIN = re.compile(
    rf"{re.escape(PREFIX)}(?!.*(?:experts|unembed))(?:"
    r"[^:]+\.(?:lora_[AB]\.weight|lora_B\.bias|lora_embedding_[AB]|lora_magnitude_vector)|"
    r"(?!.*\.(?:lora_|ranknum|hada_|lokr_|oft_|boft_|vera_|ia3_|hra_|hira_|miss_))[^:]+)"
)
BASE_LAYER = ".base_layer"  # path component of the layer inside a wrapper
BASE_LAYER_VALUE = re.compile(r"\.base_layer\.\w+$")  # a value of the layer directly in a wrapper
TOKENS = ".token_adapter"  # path component of the wrapper for trained rows
NO_WRAPPERS: Mapping[str, int] = {}


def factor_keys(
    module: str,
    levels: Mapping[str, int] = NO_WRAPPERS,  # wrappers around each module of the file
    depth: int = 0,  # wrappers of the module's other parameters around these factors
    kind: str = "module",
) -> tuple[str, str]:
    """Keys of a module's a and b in a file whose modules are wrapped `levels` times."""
    keys = part_keys(module, kind, levels, depth)
    return keys["a"], keys["b"]


def part_keys(
    module: str, kind: str = "module", levels: Mapping[str, int] = NO_WRAPPERS, depth: int = 0
) -> dict[str, str]:
    """Keys of an adapter's tensors for a module: a, b, the bias of b, and DoRA's magnitude."""
    a, b = FACTORS[kind]
    names = {"a": a, "b": b, "bias": b.removesuffix("weight") + "bias"}
    names["magnitude"] = "lora_magnitude_vector"
    path = value_key(module, levels) + BASE_LAYER * depth
    return {role: f"{path}.{name}" for role, name in names.items()}


def value_key(name: str, levels: Mapping[str, int] = NO_WRAPPERS) -> str:
    """The key of a parameter of the model: `base_layer` once for each wrapper on its path."""
    path, module = "", ""
    for part in name.split("."):
        if module:
            path += BASE_LAYER * levels.get(module, 0) + "."
            module += "."
        path += part
        module += part
    return PREFIX + path


def token_key(module: str) -> str:
    """The key of the trained rows of an embedding or head."""
    return f"{PREFIX}{module}{TOKENS}.trainable_tokens_delta"


def replaced_key(name: str, levels: Mapping[str, int], with_rows: Collection[str]) -> str:
    """The key of a value that replaces a parameter. Modules are wrapped `levels` times, and some
    once more, for their trained rows."""
    module = name.rpartition(".")[0]
    key, leaf = value_key(name, levels).rsplit(".", 1)
    return f"{key}{TOKENS}{BASE_LAYER}.{leaf}" if module in with_rows else f"{key}.{leaf}"


def unwrapped(key: str) -> str:
    """A key without the prefixes of PEFT, torch.compile and data parallelism."""
    name = key.removeprefix(PREFIX).replace("._orig_mod.", ".")
    return name.removeprefix("_orig_mod.").removeprefix("module.")


def module_of_factors(key: str) -> str:
    """The module of a factor's key; empty for other keys."""
    module, is_factor, _ = unwrapped(key).partition(".lora_")
    return module if is_factor else ""


def canonical_key(key: str) -> str:
    """A key as PEFT writes it: with its prefix, and without an adapter's name."""
    name = re.sub(r"\.(lora_[AB])\.\w+\.(weight|bias)$", r".\1.\2", unwrapped(key))
    special = r"lora_embedding_[AB]|lora_magnitude_vector|trainable_tokens_delta"
    return PREFIX + re.sub(rf"\.({special})\.\w+(\.weight)?$", r".\1", name)


def trained_parameter(name: str, plain: set[str]) -> str:
    """The parameter of `module.modules_to_save[.<adapter>].<rest>`; other names are returned
    unchanged.

    `plain`: all names of the file, because with bias="all" PEFT saves the plain name in addition to
    the trained copy."""
    module, wrapper, rest = name.partition(".modules_to_save.")
    without_adapter = rest.partition(".")[2]
    if not wrapper:
        return name
    if not without_adapter or f"{module}.{rest}" in plain:
        return f"{module}.{rest}"
    return f"{module}.{without_adapter}"


def module_and_depth(path: str) -> tuple[str, int]:
    """A module's path without wrappers, and the number of wrappers at its end (nested parameter
    wrappers)."""
    depth = 0
    while path.endswith(BASE_LAYER):
        path, depth = path.removesuffix(BASE_LAYER), depth + 1
    return without_wrappers(path), depth


def without_wrappers(name: str) -> str:
    return re.sub(r"(?:\.base_layer)+(?=\.)", "", name)


def rewrapped_key(key: str, levels: Mapping[str, int]) -> str:
    """The key of a value other than a factor, in a file whose modules are wrapped `levels`
    times."""
    head, inner, tail = canonical_key(key).removeprefix(PREFIX).partition(".token_adapter.")
    path = head + inner.removesuffix(".")
    return value_key(without_wrappers(path), levels) + (f".{tail}" if inner else "")


def module_of(key: str) -> str:
    """The module of a value other than a factor."""
    return rewrapped_key(key, NO_WRAPPERS).removeprefix(PREFIX).rpartition(".")[0]

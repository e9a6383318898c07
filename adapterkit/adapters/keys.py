"""PEFT's names of files and keys: they live here and in `peft` and nowhere else."""

import re
from collections.abc import Mapping

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
BENEATH = re.compile(r"\.base_layer\.\w+$")  # a value of the layer right inside a wrapper


def unwrapped(key: str) -> str:
    """A key without what PEFT, torch.compile and data parallelism put around the model."""
    name = key.removeprefix(PREFIX).replace("._orig_mod.", ".")
    return name.removeprefix("_orig_mod.").removeprefix("module.")


def canonical(key: str) -> str:
    """A key as PEFT writes it: its prefix, no adapter's name inside."""
    name = re.sub(r"\.(lora_[AB])\.\w+\.(weight|bias)$", r".\1.\2", unwrapped(key))
    name = re.sub(
        r"\.(lora_embedding_[AB]|lora_magnitude_vector|trainable_tokens_delta)\.\w+(\.weight)?$",
        r".\1",
        name,
    )
    return PREFIX + name


def trained_copy(name: str, plain: set[str]) -> str:
    """The parameter meant by `module.modules_to_save[.<adapter>].<rest>`; bias="all" saves it so beside the plain name."""
    module, wrapper, rest = name.partition(".modules_to_save.")
    without_adapter = rest.partition(".")[2]
    if not wrapper:
        return name
    return (
        f"{module}.{rest}"
        if not without_adapter or f"{module}.{rest}" in plain
        else f"{module}.{without_adapter}"
    )


def module_and_depth(path: str) -> tuple[str, int]:
    """Module path without wrapper levels, and how many levels stand at its end (nested parameter wrappers)."""
    depth = 0
    while path.endswith(".base_layer"):
        path, depth = path.removesuffix(".base_layer"), depth + 1
    return without_wrappers(path), depth


def without_wrappers(name: str) -> str:
    return re.sub(r"(?:\.base_layer)+(?=\.)", "", name)


def wrapped(path: str, levels: Mapping[str, int]) -> str:
    """A plain path as PEFT writes it: `base_layer` once for each wrapper around a module that it goes through."""
    found, module = "", ""
    for part in path.split("."):
        found += (
            ".base_layer" * (levels.get(module, 0) if module else 0)
            + ("." if module else "")
            + part
        )
        module += ("." if module else "") + part
    return found


FACTORS = {
    "module": ("lora_A.weight", "lora_B.weight"),
    "embedding": ("lora_embedding_A", "lora_embedding_B"),
}


def factor_keys(
    module: str, levels: Mapping[str, int], depth: int = 0, kind: str = "module"
) -> tuple[str, str]:
    """Keys of a and b in a file whose modules are wrapped so many times, under `depth` wrappers of
    the module itself; `kind` as in `Lora`."""
    path = beneath(PREFIX + wrapped(module, levels), depth)
    a, b = FACTORS[kind]
    return f"{path}.{a}", f"{path}.{b}"


def value_key(parameter: str, levels: Mapping[str, int]) -> str:
    """Key of a parameter's trained value in a file whose modules are wrapped so many times."""
    return PREFIX + wrapped(parameter, levels)


def beneath(path: str, depth: int) -> str:
    """The path of what lies under so many wrappers."""
    return path + ".base_layer" * depth


def rewrapped(key: str, levels: Mapping[str, int]) -> str:
    """The canonical key of a value that is no factor in a file whose modules are wrapped so many times."""
    head, inner, tail = canonical(key).removeprefix(PREFIX).partition(".token_adapter.")
    path = head + inner.removesuffix(".")
    return PREFIX + wrapped(without_wrappers(path), levels) + (f".{tail}" if inner else "")

"""Read and change a model's config.json with its sub-configs (text_config, vision_config, ...)."""

import inspect
from typing import Any

SWITCH = "tie_word_embeddings"


def has_other_effects(tied: Any, untied: Any) -> bool:
    """Return whether the switch changes more than the tie: the config, the parameters or the
    forward. For example, T5 scales the decoder's outputs by it, which only the code shows."""
    if _without_switch(tied.config.to_dict()) != _without_switch(untied.config.to_dict()):
        return True
    shapes = [[(k, v.shape) for k, v in model.state_dict().items()] for model in (tied, untied)]
    if shapes[0] != shapes[1]:
        return True
    classes = {
        cls
        for module in untied.modules()
        for cls in type(module).__mro__
        if cls.__module__.startswith("transformers.")
    }
    return any(
        SWITCH in inspect.getsource(vars(cls)["forward"])
        for cls in classes
        if "forward" in vars(cls)
    )


def _without_switch(config: object) -> Any:
    """A config without the switch, and without the path that it was read from."""
    if not isinstance(config, dict):
        return config
    return {k: _without_switch(v) for k, v in config.items() if k not in (SWITCH, "_name_or_path")}


def nested_values(config: dict, key: str) -> list[Any]:
    """The key's values in the config and in its sub-configs."""
    values = [config[key]] if key in config else []
    for value in config.values():
        if isinstance(value, dict):
            values += nested_values(value, key)
    return values


def vocabulary_sizes(config: dict) -> set[int]:
    """All sizes of vocabularies in the config."""
    return {size for size in nested_values(config, "vocab_size") if isinstance(size, int)}


def set_nested(config: dict, key: str, value: object, *, old: object = None) -> None:
    """Set a key, in place, in the config and its sub-configs that have it already; with `old`, only
    if it has that value."""
    if key in config and old in (None, config[key]):
        config[key] = value
    for sub_config in config.values():
        if isinstance(sub_config, dict):
            set_nested(sub_config, key, value, old=old)


def sub_configs(config: dict) -> list[dict]:
    """The configs of models inside the config, at any depth."""
    direct = [v for v in config.values() if isinstance(v, dict) and "model_type" in v]
    return direct + [inner for config in direct for inner in sub_configs(config)]

"""A model's config.json with its sub-configs (text_config, vision_config, ...)."""

from typing import Any


def nested_values(config: dict, key: str) -> list[Any]:
    """The key's values in the config and in its sub-configs."""
    values = [config[key]] if key in config else []
    for value in config.values():
        if isinstance(value, dict):
            values += nested_values(value, key)
    return values


def vocabulary_sizes(config: dict) -> set[int]:
    """All sizes of vocabularies that the config names."""
    return {size for size in nested_values(config, "vocab_size") if isinstance(size, int)}


def set_nested(config: dict, key: str, value: Any, *, old: Any = None) -> None:
    """Set a key, in place, in the config and its sub-configs where it is there already; with `old`
    only where it has that value."""
    if key in config and old in (None, config[key]):
        config[key] = value
    for sub_config in config.values():
        if isinstance(sub_config, dict):
            set_nested(sub_config, key, value, old=old)


def sub_configs(config: dict) -> list[dict]:
    """The configs of models inside the config, at any depth."""
    direct = [v for v in config.values() if isinstance(v, dict) and "model_type" in v]
    return direct + [inner for config in direct for inner in sub_configs(config)]

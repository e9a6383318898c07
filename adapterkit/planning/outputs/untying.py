"""What it means to a model that its embedding and its head are tied no longer."""

import inspect
from typing import Any

SWITCH = "tie_word_embeddings"


def has_other_effects(tied: Any, untied: Any) -> bool:
    """Whether the switch does more to a model than to untie it: to its config, to its parameters,
    or in its forward (T5 and its kin scale the decoder's outputs by it, which only the code
    says)."""
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


def _without_switch(config: Any) -> Any:
    """A config without the switch, and without the path that it was read from."""
    if not isinstance(config, dict):
        return config
    return {k: _without_switch(v) for k, v in config.items() if k not in (SWITCH, "_name_or_path")}

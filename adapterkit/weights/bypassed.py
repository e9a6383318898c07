"""Layers on which PEFT's factors would be refused, or would not act: the code around them reads
their weights itself."""

import inspect
import re
from functools import cache

from adapterkit.weights.names import Names

ATTENTION = "MultiheadAttention"  # torch's: multiplies by its projections' weights itself
# Of these PEFT refuses factors on the first two layers; the third a fused kernel's path passes by
MAMBAS = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
MAMBAS_SPARED = ("out_proj", "conv1d", "x_proj")


def classes_of(names: Names, module: str) -> tuple[type, ...]:
    """A module's class and those that it is derived from; none where the model was not built."""
    return () if names.model is None else names.model.classes(module)


def is_bypassed(names: Names, module: str) -> bool:
    """Whether PEFT refuses factors on a layer, or the code around it multiplies by its weight
    itself, past any factors, or asks a convolution for its stride or sizes, which PEFT's wrapper
    does not have."""
    parent, _, leaf = module.rpartition(".")
    if names.base.config.get("model_type") in MAMBAS and leaf in MAMBAS_SPARED:
        return True
    convolution = names.layer(module) in ("Conv1d", "Conv2d", "Conv3d")
    return _is_read(classes_of(names, parent), leaf, convolution)


@cache
def _is_read(around: tuple[type, ...], leaf: str, convolution: bool) -> bool:
    """Whether the code of these classes uses more of a child of that name than its forward."""
    if any(cls.__name__ == ATTENTION for cls in around):
        return True
    code = "\n".join(
        inspect.getsource(cls) for cls in around if cls.__module__.startswith("transformers.")
    )
    leaf = re.escape(leaf)
    asked = re.search(
        rf"\.{leaf}\.(stride|kernel_size|padding|dilation|in_channels|out_channels)\b", code
    )
    # by a function that is given it
    asked = asked or (convolution and re.search(rf"[(,]\s*self\.{leaf}\s*[,)]", code))
    read = re.search(rf"\.{leaf}\.weight\b(?!\.(dtype|device|shape|data)\b)", code)
    # even where another path calls the layer
    factor = re.search(rf"\.{leaf}\.weight\s*@|@\s*self\.{leaf}\.weight\b", code)
    return bool(asked or factor or (read and not re.search(rf"\.{leaf}\(", code)))

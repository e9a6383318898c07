"""Layers on which PEFT's factors would be refused, or would not act: the code around them reads
their weights itself."""

import inspect
import re
from functools import cache

from adapterkit.weights.names import Names

ATTENTION = "MultiheadAttention"  # torch's: multiplies by its projections' weights itself
# PEFT refuses factors on two layers of these; a third one a fused kernel's path passes by
MAMBAS = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
MAMBAS_REFUSED = ("out_proj", "conv1d")
MAMBAS_SPARED = (*MAMBAS_REFUSED, "x_proj")
# transformers' groups of conversions -> ends of names that PEFT takes for their stacks of experts,
# wherever a module of that name is
PEFT_EXPERTS = {
    "mixtral": ("gate", "w1", "w2", "w3"),
    "qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj"),
}


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


def is_taken_for_experts(model_type: str | None, module: str) -> bool:
    """Whether PEFT, where a layer of that name is among the target modules, targets stacks of
    experts instead. It does not do so with the layer's weight among the target parameters."""
    return module.rpartition(".")[2] in names_of_experts(model_type)


@cache
def names_of_experts(model_type: str | None) -> tuple[str, ...]:
    """Ends of names that PEFT 0.21 turns into those of experts' parameters, shared experts and
    dense layers included, whose factors it then leaves out silently."""
    if model_type is None:
        return ()
    from transformers import conversion_mapping

    groups = getattr(conversion_mapping, "_MODEL_TO_CONVERSION_PATTERN", {})
    groups = groups | {"mixtral": "mixtral"}  # PEFT's own
    return PEFT_EXPERTS.get(groups.get(model_type, ""), ())


@cache
def _is_read(around: tuple[type, ...], leaf: str, convolution: bool) -> bool:
    """Whether the code of these classes uses more of a child of that name than its forward."""
    if reads_weight(around, leaf):
        return True
    code, leaf = _code(around), re.escape(leaf)
    asked = re.search(
        rf"\.{leaf}\.(stride|kernel_size|padding|dilation|in_channels|out_channels)\b", code
    )
    # by a function that is given it
    asked = asked or (convolution and re.search(rf"[(,]\s*self\.{leaf}\s*[,)]", code))
    return bool(asked)


@cache
def reads_weight(around: tuple[type, ...], leaf: str) -> bool:
    """Whether the code of these classes multiplies by the weight of a child of that name itself."""
    if any(cls.__name__ == ATTENTION for cls in around):
        return True
    # to read the source of a model's classes takes half a second
    if not any({leaf, "weight"} <= _attributes(cls) for cls in _of_transformers(around)):
        return False
    code, leaf = _code(around), re.escape(leaf)
    read = re.search(rf"\.{leaf}\.weight\b(?!\.(dtype|device|shape|data)\b)", code)
    # even where another path calls the layer
    factor = re.search(rf"\.{leaf}\.weight\s*@|@\s*self\.{leaf}\.weight\b", code)
    return bool(factor or (read and not re.search(rf"\.{leaf}\(", code)))


def _of_transformers(classes: tuple[type, ...]) -> list[type]:
    return [cls for cls in classes if cls.__module__.startswith("transformers.")]


@cache
def _code(classes: tuple[type, ...]) -> str:
    """The source of those of these classes that transformers defines."""
    return "\n".join(map(inspect.getsource, _of_transformers(classes)))


@cache
def _attributes(cls: type) -> frozenset[str]:
    """The names of attributes in the code of a class's own methods."""
    values = [getattr(value, "fget", value) for value in vars(cls).values()]
    functions = [inspect.unwrap(getattr(value, "__func__", value)) for value in values if value]
    codes = [value.__code__ for value in functions if inspect.isfunction(value)]
    names: set[str] = set()
    while codes:
        code = codes.pop()
        names.update(code.co_names)
        codes += [inner for inner in code.co_consts if inspect.iscode(inner)]
    return frozenset(names)

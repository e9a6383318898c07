"""Classify layers of a model: their kind, whether they are linear, and whether PEFT's factors act
on them.

A linear layer multiplies its inputs by its weight, adds its bias, and does nothing else. PEFT
refuses factors on some layers; on others they have no effect, because the code around the layer
reads its weight itself."""

from __future__ import annotations

import ast
import copy
import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from adapterkit.core.lazy import torch

if TYPE_CHECKING:
    from adapterkit.core.weights.names import Names

ATTENTION = "MultiheadAttention"  # torch's: multiplies by its projections' weights itself
# PEFT refuses factors on two layers of these; a fused kernel bypasses those of a third one
MAMBAS = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
MAMBAS_REFUSED = ("out_proj", "conv1d")
MAMBAS_EXCLUDED = (*MAMBAS_REFUSED, "x_proj")
GENERAL = ("torch.", "builtins", "transformers.modeling_utils", "transformers.generation")
LIBRARIES = ("torch.", "bitsandbytes.")
STARTS = re.compile(r"__init__|_*(init|reset|tie|resize|set)_")  # methods
PASSIVE = [("dtype",), ("device",), ("shape",), ("data",), ("ndim",), ("size",), ("numel",)]
CONVOLUTION_SETTINGS = [
    (name,)
    for name in ("stride", "kernel_size", "padding", "dilation", "in_channels", "out_channels")
]
GIVEN, FACTOR = "given", "factor"  # as a function's argument, or as a product's factor
# transformers' groups of conversions -> ends of names that PEFT takes for their stacks of experts,
# for every module of that name
PEFT_EXPERTS = {
    "mixtral": ("gate", "w1", "w2", "w3"),
    "qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj"),
}
_SMALL = (15, (3, 5)), (3, (3,)), (40, (2, 4, 5))  # sizes of a weight, a bias and an input


def kind_of(host: torch.nn.Module) -> str | None:
    """The kind of layer that a module is; None for one that takes no factors."""
    if is_conv1d(host):
        return "conv1d"
    if isinstance(host, torch.nn.Embedding):
        return "embedding"
    if isinstance(host, torch.nn.Conv1d | torch.nn.Conv2d | torch.nn.Conv3d):
        return "conv"
    if isinstance(host, torch.nn.MultiheadAttention):
        return "attention"
    if isinstance(host, torch.nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "attention_output"
    if hasattr(host, "in_features") and hasattr(host, "out_features"):
        return None if is_odd_linear(host) else "linear"
    return None


def is_conv1d(host: torch.nn.Module) -> bool:
    """Return whether a module is transformers' Conv1D."""
    return type(host).__name__ == "Conv1D" and hasattr(host, "nf")


def is_linear(module: torch.nn.Module) -> bool:
    """Return whether a module is GPT-2's Conv1D, a Linear, or a subclass that computes the same.
    For example, a router does not."""
    return linear_class(module) is not None


def linear_class(module: torch.nn.Module) -> str | None:
    """The class that a module computes as, "Linear" or "Conv1D"; None for another one."""
    if isinstance(module, torch.nn.Linear):
        cls = type(module)
        is_plain = cls.forward is torch.nn.Linear.forward
        return "Linear" if is_plain or _computes_as_linear(cls, module) else None
    from transformers.pytorch_utils import Conv1D

    return "Conv1D" if isinstance(module, Conv1D) else None


def is_odd_linear(module: torch.nn.Module) -> bool:
    """Return whether a module of a model's own class is a Linear by its weight only: a router that
    returns a tuple, or a product for each group. Quantized layers do not count."""
    of_model = type(module).__module__.startswith("transformers.models.")
    return of_model and isinstance(module, torch.nn.Linear) and not is_linear(module)


_COMPUTES: dict[type, bool] = {}


def _computes_as_linear(cls: type, module: torch.nn.Linear) -> bool:
    """Return whether a class's own forward gives x @ Wᵀ + bias, by running it on small values."""
    if cls not in _COMPUTES:
        _COMPUTES[cls] = _is_product(cls, module)
    return _COMPUTES[cls]


def _is_product(cls: Any, module: torch.nn.Linear) -> bool:
    weight, bias, x = (torch.arange(count).cos().view(shape) for count, shape in _SMALL)
    probe: Any = copy.copy(module)
    probe._parameters = dict(module._parameters) | {"weight": weight}
    if module.bias is None:
        bias = None
    else:
        probe._parameters["bias"] = bias
    probe.in_features, probe.out_features = 5, 3
    try:
        with torch.no_grad():
            y = cls.forward(probe, x)
        return torch.allclose(y, torch.nn.functional.linear(x, weight, bias), rtol=1e-4, atol=1e-5)
    except Exception:  # it needs more inputs or other sizes, or returns no tensor
        return False


def is_bypassed(names: Names, module: str) -> bool:
    """Return whether factors on a layer would be refused by PEFT or have no effect. The code around
    a layer may multiply by its weight itself. Or it reads a convolution's stride or sizes, which
    PEFT's wrapper does not have."""
    parent, _, leaf = module.rpartition(".")
    if names.base.config.get("model_type") in MAMBAS and leaf in MAMBAS_EXCLUDED:
        return True
    convolution = names.layer(module) in ("Conv1d", "Conv2d", "Conv3d")
    return _is_read(names.classes(parent), leaf, convolution)


def weight_reader(names: Names, module: str) -> str | None:
    """The class around a module that multiplies by its weight itself, bypassing factors. None if it
    calls the module, or is torch's attention, because PEFT puts factors on both its projections."""
    parent, _, leaf = module.rpartition(".")
    around = names.classes(parent)
    is_attention = any(cls.__name__ == ATTENTION for cls in around)
    return None if is_attention else reader_of(around, leaf)


def reader_of(around: tuple[type, ...], leaf: str, model_type: str | None = None) -> str | None:
    """The first of the classes around a child of that name whose code multiplies by its weight
    itself, as in models of some types; None if it calls the child."""
    is_mamba = model_type in MAMBAS and leaf in MAMBAS_REFUSED
    return around[0].__name__ if is_mamba or reads_weight(around, leaf) else None


def looks_up_otherwise(classes: tuple[type, ...]) -> bool:
    """Return whether a class of embeddings does more in its forward than take rows or scale them
    (embed_scale). Then neither a delta of its weight nor PEFT's factors are a delta of its
    output."""
    if not any(
        cls.__name__ == "Embedding" and cls.__module__.startswith(LIBRARIES) for cls in classes
    ):
        return False
    own = next(cls for cls in classes if "forward" in vars(cls))
    return not own.__module__.startswith(LIBRARIES) and not any(
        "embed_scale" in _attributes(cls) for cls in classes
    )


def is_taken_for_experts(model_type: str | None, module: str) -> bool:
    """Return whether PEFT targets stacks of experts instead of a layer of that name among the
    target modules. It does not do so for the layer's weight among the target parameters."""
    return module.rpartition(".")[2] in names_of_experts(model_type)


@cache
def names_of_experts(model_type: str | None) -> tuple[str, ...]:
    """Ends of names that PEFT 0.21 turns into those of experts' parameters. This includes shared
    experts and dense layers, whose factors it then leaves out silently."""
    if model_type is None:
        return ()
    from transformers import conversion_mapping

    groups = getattr(conversion_mapping, "_MODEL_TO_CONVERSION_PATTERN", {})
    groups = groups | {"mixtral": "mixtral"}  # PEFT's own
    return PEFT_EXPERTS.get(groups.get(model_type, ""), ())


@cache
def _is_read(around: tuple[type, ...], leaf: str, convolution: bool) -> bool:
    """Return whether the code of these classes uses more of a child of that name than its
    forward."""
    if reads_weight(around, leaf):
        return True
    uses = _uses_of(around, leaf)
    reads_setting = any(use.after(leaf)[:1] in CONVOLUTION_SETTINGS for use in uses)
    # a function that gets the child may read it
    return reads_setting or (
        convolution and any(use.path[-1] == leaf and use.how == GIVEN for use in uses)
    )


@cache
def reads_weight(around: tuple[type, ...], leaf: str) -> bool:
    """Return whether the code of these classes multiplies by the weight of a child of that name
    itself, and does not call the child. One path with such a product is enough, even if another
    calls it."""
    if any(cls.__name__ == ATTENTION for cls in around):
        return True
    uses = [use for use in _uses_of(around, leaf) if "weight" in use.after(leaf)[:1]]
    if any(use.how == FACTOR and use.path[-1] == "weight" for use in uses):
        return True
    read = any(use.reads((leaf, "weight")) for use in uses)
    return read and not any(use.path[-1] == leaf for use in _uses_of(around, leaf))


@cache
def reads_value(around: tuple[type, ...], path: tuple[str, ...], owner: tuple[type, ...]) -> bool:
    """Return whether the code of these classes reads a value at that path below them, such as
    ("conv1d", "bias"), directly or by a method of its owner other than the forward."""
    if len(path) == 2 and any(cls.__name__ == ATTENTION for cls in around):
        return True
    if any(use.reads(path) for use in _uses_of(around, *path)):
        return True
    return len(path) == 2 and _calls_reader(around, path[0], owner, path[1])


def _calls_reader(around: tuple[type, ...], leaf: str, owner: tuple[type, ...], value: str) -> bool:
    """Return whether the code of these classes calls a method of a child of that name, other than
    its forward, and the child's code reads the value. Wrapping the child's call cannot intercept
    that."""
    own = [cls for cls in owner if not cls.__module__.startswith(GENERAL)]
    if not any({value, "forward"} & _attributes(cls) for cls in own):  # super's may read it
        return False
    methods = {
        (name,)
        for cls in own
        for name, method in vars(cls).items()
        if inspect.isfunction(method) and name != "forward"
    }
    return any(use.after(leaf)[:1] in methods for use in _uses_of(around, leaf) if not use.starts)


@dataclass(frozen=True)
class AttributeAccess:
    """Use of an attribute of an attribute: self.conv1d.weight.squeeze(1) calls ("conv1d", "weight",
    "squeeze")."""

    path: tuple[str, ...]
    how: str
    starts: bool  # whether the code initializes or ties weights

    def after(self, name: str) -> tuple[str, ...]:
        """The names after a name."""
        return self.path[self.path.index(name) + 1 :] if name in self.path else ()

    def reads(self, path: tuple[str, ...]) -> bool:
        """Return whether it reads the value at that path, and not only its shape or dtype."""
        ends = (i + len(path) for i in range(len(self.path) - len(path) + 1))
        return not self.starts and any(
            self.path[end - len(path) : end] == path and self.path[end : end + 1] not in PASSIVE
            for end in ends
        )


def _uses_of(around: tuple[type, ...], *names: str) -> list[AttributeAccess]:
    """The uses of attributes of these names in the code of classes, except torch's and the bases of
    all models."""
    # reading the source of a model's classes takes half a second
    own = [cls for cls in around if not cls.__module__.startswith(GENERAL)]
    named = (cls for cls in own if {*names} <= _attributes(cls))
    return [use for cls in named for use in _uses(cls) if {*names} & {*use.path}]


@cache
def _uses(cls: type) -> tuple[AttributeAccess, ...]:
    """All uses of attributes in a class's own code; none if there is no source."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError, SyntaxError):
        return ()
    return tuple(_found(tree, "", False))


def _found(node: ast.AST, how: str, starts: bool) -> Iterator[AttributeAccess]:
    if isinstance(node, ast.FunctionDef):
        starts = starts or STARTS.match(node.name) is not None
    if isinstance(node, ast.Attribute):
        path, base = [], node
        while isinstance(base, ast.Attribute):
            path.append(base.attr)
            base = base.value
        if isinstance(node.ctx, ast.Load):
            yield AttributeAccess(tuple(reversed(path)), how, starts)
        node = base
    for field, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _found(child, _role(node, field), starts)


def _role(node: ast.AST, field: str) -> str:
    """The role that a node gives to the contents of one of its fields."""
    if isinstance(node, ast.Call) and field == "args":
        return GIVEN
    return FACTOR if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult) else ""


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

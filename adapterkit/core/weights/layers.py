"""Layers of a model: of which kind each is, which are linear (they multiply their inputs by their
weight and add their bias, and nothing else), and on which PEFT's factors would be refused, or would
not act, because the code around them reads their weights itself."""

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
# PEFT refuses factors on two layers of these; a third one a fused kernel's path passes by
MAMBAS = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
MAMBAS_REFUSED = ("out_proj", "conv1d")
MAMBAS_SPARED = (*MAMBAS_REFUSED, "x_proj")
GENERAL = ("torch.", "builtins", "transformers.modeling_utils", "transformers.generation")
LIBRARIES = ("torch.", "bitsandbytes.")
STARTS = re.compile(r"__init__|_*(init|reset|tie|resize|set)_")  # methods
PASSIVE = [("dtype",), ("device",), ("shape",), ("data",), ("ndim",), ("size",), ("numel",)]
ASKED = [
    (name,)
    for name in ("stride", "kernel_size", "padding", "dilation", "in_channels", "out_channels")
]
GIVEN, FACTOR = "given", "factor"  # to a function; of a product
# transformers' groups of conversions -> ends of names that PEFT takes for their stacks of experts,
# wherever a module of that name is
PEFT_EXPERTS = {
    "mixtral": ("gate", "w1", "w2", "w3"),
    "qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj"),
}
_SMALL = (15, (3, 5)), (3, (3,)), (40, (2, 4, 5))  # sizes of a weight, a bias and an input


def kind_of(host: torch.nn.Module) -> str | None:
    """The kind of layer that a module is, None for one that takes no factors."""
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
    """Whether a module is transformers' Conv1D."""
    return type(host).__name__ == "Conv1D" and hasattr(host, "nf")


def is_linear(module: torch.nn.Module) -> bool:
    """Whether a module is a Linear, one of its subclasses that computes the same (a router, say,
    does not), or GPT-2's Conv1D."""
    return linear_class(module) is not None


def linear_class(module: torch.nn.Module) -> str | None:
    """ "Linear" or "Conv1D", which one a module computes as; None for another one."""
    if isinstance(module, torch.nn.Linear):
        cls = type(module)
        is_plain = cls.forward is torch.nn.Linear.forward
        return "Linear" if is_plain or _computes_as_linear(cls, module) else None
    from transformers.pytorch_utils import Conv1D

    return "Conv1D" if isinstance(module, Conv1D) else None


def is_odd_linear(module: torch.nn.Module) -> bool:
    """Whether a module of a model's own class is a Linear by its weight only: a router that gives a
    tuple, a product for each group. Quantized layers are no model's."""
    of_model = type(module).__module__.startswith("transformers.models.")
    return of_model and isinstance(module, torch.nn.Linear) and not is_linear(module)


_COMPUTES: dict[type, bool] = {}


def _computes_as_linear(cls: type, module: torch.nn.Linear) -> bool:
    """Whether a class's own forward gives x @ Wᵀ + bias: it is asked, with small values."""
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
    except Exception:  # it wants more than an input, or other sizes, or gives no tensor
        return False


def is_bypassed(names: Names, module: str) -> bool:
    """Whether PEFT refuses factors on a layer, or the code around it multiplies by its weight
    itself, past any factors, or asks a convolution for its stride or sizes, which PEFT's wrapper
    does not have."""
    parent, _, leaf = module.rpartition(".")
    if names.base.config.get("model_type") in MAMBAS and leaf in MAMBAS_SPARED:
        return True
    convolution = names.layer(module) in ("Conv1d", "Conv2d", "Conv3d")
    return _is_read(names.classes(parent), leaf, convolution)


def weight_reader(names: Names, module: str) -> str | None:
    """The class around a module that multiplies by its weight itself, past any factors; None if it
    calls the module, or is torch's attention, whose factors PEFT puts on both projections."""
    parent, _, leaf = module.rpartition(".")
    around = names.classes(parent)
    is_attention = any(cls.__name__ == ATTENTION for cls in around)
    return None if is_attention else reader_of(around, leaf)


def reader_of(around: tuple[type, ...], leaf: str, model_type: str | None = None) -> str | None:
    """The first of the classes around a child of that name, where their code multiplies by its
    weight itself, as it does in models of some types; None if it calls the child."""
    is_mamba = model_type in MAMBAS and leaf in MAMBAS_REFUSED
    return around[0].__name__ if is_mamba or reads_weight(around, leaf) else None


def looks_up_otherwise(classes: tuple[type, ...]) -> bool:
    """Whether a class of embeddings does more in its forward than take rows, or scale them
    (embed_scale): a delta of its weight is none of its output, as PEFT's factors are."""
    if not any(
        cls.__name__ == "Embedding" and cls.__module__.startswith(LIBRARIES) for cls in classes
    ):
        return False
    own = next(cls for cls in classes if "forward" in vars(cls))
    return not own.__module__.startswith(LIBRARIES) and not any(
        "embed_scale" in _attributes(cls) for cls in classes
    )


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
    uses = _uses_of(around, leaf)
    asked = any(use.after(leaf)[:1] in ASKED for use in uses)
    # by a function that is given it
    return asked or (convolution and any(use.path[-1] == leaf and use.how == GIVEN for use in uses))


@cache
def reads_weight(around: tuple[type, ...], leaf: str) -> bool:
    """Whether the code of these classes multiplies by the weight of a child of that name itself,
    and does not call the child; even where it calls it, if one path is a product with it."""
    if any(cls.__name__ == ATTENTION for cls in around):
        return True
    uses = [use for use in _uses_of(around, leaf) if "weight" in use.after(leaf)[:1]]
    if any(use.how == FACTOR and use.path[-1] == "weight" for use in uses):
        return True
    read = any(use.reads((leaf, "weight")) for use in uses)
    return read and not any(use.path[-1] == leaf for use in _uses_of(around, leaf))


@cache
def reads_value(around: tuple[type, ...], path: tuple[str, ...], owner: tuple[type, ...]) -> bool:
    """Whether the code of these classes reads a value at that path below them, such as
    ("conv1d", "bias"), itself or by a method of its owner, and not the owner's forward alone."""
    if len(path) == 2 and any(cls.__name__ == ATTENTION for cls in around):
        return True
    if any(use.reads(path) for use in _uses_of(around, *path)):
        return True
    return len(path) == 2 and _calls_reader(around, path[0], owner, path[1])


def _calls_reader(around: tuple[type, ...], leaf: str, owner: tuple[type, ...], value: str) -> bool:
    """Whether the code of these classes calls a child of that name by a method other than its
    forward, and the child's code reads the value: no call of the child surrounds that."""
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
    """What code does with an attribute of an attribute: self.conv1d.weight.squeeze(1) calls
    ("conv1d", "weight", "squeeze")."""

    path: tuple[str, ...]
    how: str
    starts: bool  # whether it is in code that gives a model its first values, or ties them

    def after(self, name: str) -> tuple[str, ...]:
        """What follows a name."""
        return self.path[self.path.index(name) + 1 :] if name in self.path else ()

    def reads(self, path: tuple[str, ...]) -> bool:
        """Whether it is the value at that path, and more than its shape or dtype."""
        ends = (i + len(path) for i in range(len(self.path) - len(path) + 1))
        return not self.starts and any(
            self.path[end - len(path) : end] == path and self.path[end : end + 1] not in PASSIVE
            for end in ends
        )


def _uses_of(around: tuple[type, ...], *names: str) -> list[AttributeAccess]:
    """The uses of attributes of these names in the code of classes, torch's own and bases of all
    models left out."""
    # to read the source of a model's classes takes half a second
    own = [cls for cls in around if not cls.__module__.startswith(GENERAL)]
    named = (cls for cls in own if {*names} <= _attributes(cls))
    return [use for cls in named for use in _uses(cls) if {*names} & {*use.path}]


@cache
def _uses(cls: type) -> tuple[AttributeAccess, ...]:
    """All uses of attributes in a class's own code; none where there is no source."""
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
    """What a node does with what is in one of its fields."""
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

"""Which modules are layers that take factors, and which of them are linear: what multiplies its
inputs by its weight and adds its bias, and nothing else."""

from __future__ import annotations

import copy
from typing import Any

from adapterkit.core.lazy import torch


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


_SMALL = (15, (3, 5)), (3, (3,)), (40, (2, 4, 5))  # sizes of a weight, a bias and an input

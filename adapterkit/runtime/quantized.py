"""Quantized layers: how their weights are read, and written again after a merge.

Any layer with in_features and out_features takes factors. DoRA's norms, and merging, read the
weight too; `register_quantized` says how, for classes that are not here.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from adapterkit.errors import Refused
from adapterkit.runtime.site import CHILD, Site, owner

Dequantize = Callable[[Any], Tensor]
Requantize = Callable[[Any, Tensor], Mapping[str, nn.Parameter]]


@dataclass(frozen=True)
class Quantization:
    """How layers of one kind hold their weights."""

    matches: str | Callable[[nn.Module], bool]
    dequantize: Dequantize
    requantize: Requantize | None = None

    def holds(self, module: nn.Module) -> bool:
        if callable(self.matches):
            return self.matches(module)
        return any(cls.__name__ == self.matches for cls in type(module).__mro__)


REGISTERED: list[Quantization] = []


def register_quantized(
    matches: str | Callable[[nn.Module], bool],
    dequantize: Dequantize,
    requantize: Requantize | None = None,
) -> None:
    """Say how the weights of quantized layers are read; later calls come first.

    `matches`: a class's name (of a parent too), or a test of a module. `dequantize(module)`: the
    weight (out, in), any float dtype. `requantize(module, weight)`: the module's new parameters by
    name for a float32 weight, quantized with its own settings; without it, merging is refused."""
    REGISTERED.insert(0, Quantization(matches, dequantize, requantize))


def quantization_of(host: nn.Module) -> Quantization | None:
    """How a layer is quantized; None if it is not, or nobody knows."""
    return next((known for known in REGISTERED if known.holds(host)), None)


def weight_of(host: nn.Module) -> Tensor:
    """A layer's own weight, also while adapters are merged into it; of a quantized one (out, in)
    float32. `Refused` where nobody knows how to read it."""
    with _unmerged(host):
        known = quantization_of(host)
        if known is not None:
            return known.dequantize(host).detach().to(torch.float32)
        weight = _plain(host)
    if weight is None:
        raise Refused(
            f"the weight of a {type(host).__name__}",
            expected="a plain weight, or a quantized one that can be read",
            where="weight",
            hint="adapterkit.runtime.register_quantized says how it is read",
        )
    return weight


def is_readable(host: nn.Module) -> bool:
    """Whether `weight_of` has an answer."""
    return quantization_of(host) is not None or _plain(host) is not None


def stored(host: nn.Module) -> list[Tensor]:
    """The tensors that hold a layer's weight."""
    with _unmerged(host):
        tensors = chain(host._parameters.items(), host._buffers.items())
        return [value for leaf, value in tensors if value is not None and leaf != "bias"]


def _plain(host: nn.Module) -> Tensor | None:
    """A weight that is its values: not integers, bytes, 8-bit floats or a quantized subclass."""
    weight = host._parameters.get("weight")
    if weight is None or not weight.is_floating_point() or weight.element_size() < 2:
        return None
    return weight.detach()


@contextmanager
def _unmerged(host: nn.Module) -> Iterator[None]:
    site = host._modules.get(CHILD)
    if not isinstance(site, Site) or not site.unmerged:
        yield
        return
    places = [(*owner(host, name), own) for name, own in site.unmerged.items()]
    merged = [module._parameters[leaf] for module, leaf, _ in places]
    try:
        for module, leaf, own in places:
            module._parameters[leaf] = own
        yield
    finally:
        for (module, leaf, _), parameter in zip(places, merged, strict=True):
            module._parameters[leaf] = parameter

"""Read the weights of quantized layers, and write them again after a merge.

Any layer with in_features and out_features takes factors. DoRA's norms, and merging, read the
weight too; `register_quantized` adds classes that are not listed here.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from adapterkit.core.errors import Refused
from adapterkit.core.records import Json
from adapterkit.runtime.site import CHILD, Host, Site, owner

Dequantize = Callable[[Host], Tensor]
Requantize = Callable[[Host, Tensor], Mapping[str, nn.Parameter]]


@dataclass(frozen=True)
class Quantization:
    """Functions that read and write the weights of one kind of layers."""

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
    """Register functions for the weights of quantized layers; later calls have precedence.

    `matches`: a class's name (of a parent too), or a test of a module. `dequantize(module)`: the
    weight (out, in), any float dtype. `requantize(module, weight)`: the module's new parameters by
    name for a float32 weight, quantized with its own settings; without it, merging is refused."""
    REGISTERED.insert(0, Quantization(matches, dequantize, requantize))


def quantization_of(host: nn.Module) -> Quantization | None:
    """The quantization of a layer; None if it has none, or an unknown one."""
    return next((known for known in REGISTERED if known.holds(host)), None)


def weight_of(host: nn.Module) -> Tensor:
    """A layer's own weight, or the value that replaces it, also while adapters are merged into it;
    a quantized one as (out, in) float32. `Refused` for unknown quantizations."""
    with _unmerged(host):
        known = quantization_of(host)
        if known is not None:
            return known.dequantize(host).detach().to(torch.float32, copy=True)
        weight = _plain(host)
    if weight is None:
        raise Refused(
            f"the weight of a {type(host).__name__}",
            expected="a plain weight, or a quantized one that can be read",
            where="weight",
            hint="adapterkit.runtime.register_quantized says how it is read",
            code="AK801",
        )
    return weight


def unreadable(host: nn.Module) -> str | None:
    """The reason why `weight_of` cannot read a weight, or None."""
    if quantization_of(host) is not None or _plain(host) is not None:
        return None
    return f"the weight of a {type(host).__name__} cannot be read (see register_quantized)"


def unmergeable(host: nn.Module) -> str | None:
    """The reason why nothing can be merged into a layer's weight, or None."""
    known = quantization_of(host)
    if known is None or known.requantize is not None:
        return unreadable(host)
    name = type(host).__name__
    return f"the weight of this {name} cannot be quantized again (see register_quantized)"


def tensors_of(module: nn.Module, leaf: str) -> Json:
    """The parameters of a module, or the buffers if they have that name."""
    return module._buffers if leaf in module._buffers else module._parameters


def rounded(module: nn.Module, leaf: str, value: Tensor) -> Mapping[str, Tensor]:
    """New tensors by name that give a module this value, rounded or quantized like its own."""
    known = quantization_of(module) if leaf == "weight" else None
    if known is not None:
        assert known.requantize is not None
        return known.requantize(module, value)
    own = tensors_of(module, leaf)[leaf]
    value = value.to(own.dtype)
    is_parameter = isinstance(own, nn.Parameter)
    return {leaf: nn.Parameter(value, requires_grad=False) if is_parameter else value}


@torch.no_grad()
def fitted(value: Tensor, own: Tensor) -> Tensor:
    """A parameter or buffer in another one's current dtype and on its device."""
    dtype = own.dtype if own.is_floating_point() and value.is_floating_point() else value.dtype
    if own.is_meta or (value.dtype, value.device) == (dtype, own.device):
        return value
    new = value.to(device=own.device, dtype=dtype)
    return nn.Parameter(new, value.requires_grad) if type(value) is nn.Parameter else new


def exchange(module: nn.Module, leaf: str, value: Tensor) -> Any:
    """Replace a parameter or buffer by another, fitted to it, and return the old one."""
    tensors = tensors_of(module, leaf)
    own, state = tensors[leaf], getattr(module, "state", None)
    value = fitted(value, own)
    if hasattr(own, "CB") and state is not None and state.CB is not None:
        # the first forward of a Linear8bitLt moves these from the weight to the layer
        own.CB, own.SCB, state.CB, state.SCB = state.CB, state.SCB, None, None
    if hasattr(value, "quant_state"):
        # an attribute that bitsandbytes adds
        module.quant_state = value.quant_state  # type: ignore[attr-defined]
    if type(tensors) is not dict:
        del tensors[leaf]  # or compressed-tensors copies into the one that is there
    tensors[leaf] = value
    return own


def decompress(model: nn.Module) -> None:
    """Decompress the layers of compressed-tensors in memory now, because the model's first forward
    would do it and replace the forwards of its layers."""
    handle: Any = getattr(model, "ct_decompress_hook", None)
    if handle is not None:
        model._forward_pre_hooks[handle.id](model, ())


PACKS = "support_avx512bf16_for_cpu"  # of a Linear4bit, whether it may pack its weight


def keep_unpacked(model: nn.Module) -> list[nn.Module]:
    """Keep 4-bit layers from being packed, and unpack those that are; returns these layers.

    On a CPU with AVX-512 BF16 the first forward of a Linear4bit in evaluation packs its weight,
    with scales rounded to bfloat16; after that no gradient flows through it (bitsandbytes 0.50).
    """
    layers = [module for module in model.modules() if getattr(module, PACKS, False)]
    for layer in layers:
        setattr(layer, PACKS, False)
        weight: Any = layer._parameters["weight"]
        if _is_packed(weight.quant_state):
            weight.data, weight.quant_state = _unpacked(weight.data, weight.quant_state)
    return layers


def allow_packed(layers: list[nn.Module]) -> None:
    """Undo `keep_unpacked`."""
    for layer in layers:
        setattr(layer, PACKS, True)


def stored(host: nn.Module) -> list[Tensor]:
    """The tensors that store a layer's weight."""
    with _unmerged(host):
        tensors = chain(host._parameters.items(), host._buffers.items())
        return [value for leaf, value in tensors if value is not None and leaf != "bias"]


def plainly_stored(host: nn.Module) -> Sequence[Tensor | None]:
    """As `stored`; a single None if the layer is quantized, because its scales may be anywhere."""
    return stored(host) if quantization_of(host) is None else [None]


def _plain(host: nn.Module) -> Tensor | None:
    """A weight whose elements are its values: no integers, 8-bit floats or quantized subclass."""
    weight = host._parameters.get("weight")
    if weight is None or not weight.is_floating_point() or weight.element_size() < 2:
        return None
    return weight.detach()


@contextmanager
def _unmerged(host: nn.Module) -> Iterator[None]:
    site = host._modules.get(CHILD)
    replacements = site.replacements if isinstance(site, Site) else {}
    if not replacements:
        yield
        return
    own = [(*owner(host, name), value) for name, value in replacements.items()]
    merged = [(module, leaf, exchange(module, leaf, p)) for module, leaf, p in own]
    try:
        yield
    finally:
        for module, leaf, parameter in merged:
            exchange(module, leaf, parameter)


def _bnb() -> Any:
    import bitsandbytes.functional

    return bitsandbytes.functional


def _bnb4_weight(module: Host) -> Tensor:
    functional = _bnb()

    values, state = module.weight.data, module.weight.quant_state or module.quant_state
    if _is_packed(state):
        values, state = _unpacked(values, state)
    return functional.dequantize_4bit(values, state)


def _is_packed(state: object) -> bool:
    return getattr(state, "packing_format_for_cpu", False)


def _unpacked(values: Tensor, state: Any) -> tuple[Tensor, Any]:
    """The weight and state of a Linear4bit before it was packed by its first forward without
    gradients on a CPU with AVX-512 BF16; its scales stay rounded to bfloat16."""
    functional = _bnb()

    scales = state.absmax.T.reshape(-1).float()
    state = copy.copy(state)
    state.original_nested = False
    values, state = functional._convert_weight_packed_for_cpu_inverse(values, state)
    state.absmax, state.nested = scales, False
    return values, state


def _bnb4_parameters(module: Host, weight: Tensor) -> dict[str, nn.Parameter]:
    own = module.weight
    new = type(own)(
        weight.cpu(),
        blocksize=own.blocksize,
        compress_statistics=own.compress_statistics,
        quant_type=own.quant_type,
        quant_storage=own.quant_storage,
    ).to(own.device)
    new.module = own.module
    return {"weight": new}


def _bnb8_weight(module: Host) -> Tensor:
    functional = _bnb()

    own = module.weight
    if own.dtype != torch.int8:  # has_fp16_weights: quantized at each forward
        return own
    scales = own.SCB if own.SCB is not None else module.state.SCB
    return functional.int8_vectorwise_dequant(own.data, scales.to(own.device))


def _bnb8_parameters(module: Host, weight: Tensor) -> dict[str, nn.Parameter]:
    own = module.weight
    new = type(own)(weight.cpu(), requires_grad=False, has_fp16_weights=own.has_fp16_weights)
    return {"weight": new.to(own.device)}


def _is_torchao(module: nn.Module) -> bool:
    kind = type(module._parameters.get("weight"))
    # torch.compile knows no modules of classes
    return kind is not nn.Parameter and kind.__module__.startswith("torchao.")


REGISTERED += [
    Quantization("Linear4bit", _bnb4_weight, _bnb4_parameters),
    Quantization("Linear8bitLt", _bnb8_weight, _bnb8_parameters),
    Quantization(_is_torchao, lambda module: module.weight.dequantize()),
    Quantization("HQQLinear", lambda module: module.dequantize()),
]

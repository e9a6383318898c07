"""The values of an adapter, new ones or those of its files, as parts at the modules of a model."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from adapterkit.runtime.layers import part_class
from adapterkit.runtime.layers.parameter import ParameterPart, is_transposed
from adapterkit.runtime.layers.tied import share, shared_heads
from adapterkit.runtime.parts.copies import copies, mirrors, parameter_of, value_parts
from adapterkit.runtime.parts.factors import FactorsPart
from adapterkit.runtime.parts.tokens import token_parts
from adapterkit.runtime.site import Part, owner
from adapterkit.runtime.state import State
from adapterkit.runtime.targets import own_modules
from adapterkit.verbs.shared.lora_config import LoraConfig
from adapterkit.verbs.shared.targets.resolve import input_embedding

Rows = tuple[Sequence[int], Tensor]  # indices of tokens, and their values


@dataclass(frozen=True, kw_only=True)
class LayerFactors:
    """Factors of a module, or of its parameter `leaf`."""

    path: str
    kind: type[FactorsPart]
    a: Tensor
    b: Tensor
    scale: float
    bias: Tensor | None = None
    magnitude: Tensor | None = None
    base_lacks: bool = False  # the product of these first factors, which is subtracted
    leaf: str = "weight"
    depth: int = 0  # see `ParameterPart`


@dataclass(frozen=True, kw_only=True)
class AdapterValues:
    """All that an adapter has on a model; names are the model's."""

    factors: Iterable[LayerFactors]
    heads: Mapping[str, str] | None = None  # head -> embedding; None: those of the same factors
    copies: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)  # {}: present values
    biases: Mapping[str, Tensor] = field(default_factory=dict)  # trained
    weights: Mapping[str, Tensor] = field(default_factory=dict)  # not trained
    rows: Mapping[str, Rows] = field(default_factory=dict)  # by embedding or head


def place(
    state: State,
    name: str,
    config: LoraConfig,
    values: AdapterValues,
    dtype: torch.dtype | None,  # of factors, biases and rows; None: as they are
    *,
    ephemeral_gpu_offload: bool = False,
) -> list[tuple[str, Part]]:
    """The parts of an adapter by their modules: factors first, each beside its weight."""
    modules, whole = state.modules, own_modules(state.model)
    parts: list[tuple[str, Part]] = [
        (its.path, _part(modules[its.path], name, config, its, dtype, ephemeral_gpu_offload))
        for its in values.factors
    ]
    if config.tie:
        heads = shared_heads(parts, modules) if values.heads is None else values.heads
        parts = share(parts, heads, config.dropout)
    copied = copies(modules, values.copies, name, config.tie)
    for path, part in copied:
        for leaf, value in values.copies[path].items():
            _fill(part.module, leaf, value)
    biases = {key: _beside(value, modules, key, dtype) for key, value in values.biases.items()}
    rows = {
        path: (indices, _beside(value, whole, f"{path}.weight", dtype))
        for path, (indices, value) in values.rows.items()
    }
    parts += [*copied, *mirrors(modules, copied)]
    for own, trained in ((biases, True), (values.weights, False)):
        parts += value_parts(modules, name, own, trained=trained, copied=values.copies)
    embedding = input_embedding(state.model, whole) if rows else None
    return parts + token_parts(state.model, whole, name, rows, embedding)


def _part(
    host: nn.Module,
    name: str,
    config: LoraConfig,
    values: LayerFactors,
    dtype: torch.dtype | None,
    ephemeral_gpu_offload: bool,
) -> FactorsPart:
    where = factor_device(host)
    a, b = values.a.to(where, dtype), values.b.to(where, dtype)
    bias, magnitude = (
        None if value is None else value.to(where, dtype)
        for value in (values.bias, values.magnitude)
    )
    if values.kind is ParameterPart:
        transposed = is_transposed(host, values.leaf)
        shape = {"leaf": values.leaf, "transposed": transposed, "depth": values.depth}
        return ParameterPart(name, a, b, values.scale, **shape)
    return part_class(values.kind, config)(
        name,
        a,
        b,
        values.scale,
        dropout=config.dropout,
        bias=bias,
        magnitude=magnitude,
        initial=(a.clone(), b.clone()) if values.base_lacks else None,
        ephemeral_gpu_offload=ephemeral_gpu_offload,
    )


def _beside(
    value: Tensor, modules: Mapping[str, nn.Module], name: str, dtype: torch.dtype | None
) -> Tensor:
    """A value on the device of a parameter; on the CPU while that is on meta."""
    own = parameter_of(modules, name)
    assert own is not None
    return value.to("cpu" if own.is_meta else own.device, dtype)


@torch.no_grad()
def _fill(module: nn.Module, name: str, value: Tensor) -> None:
    """Set a parameter or buffer of a copy, in its dtype; a new one where it is on meta."""
    inner, leaf = owner(module, name)
    own = getattr(inner, leaf)
    if not own.is_meta:
        own.copy_(value)
    elif isinstance(own, nn.Parameter):
        inner._parameters[leaf] = nn.Parameter(value.to(own.dtype), requires_grad=False)
    else:
        inner._buffers[leaf] = value.to(own.dtype)


def factor_device(host: nn.Module) -> torch.device:
    """Where a host's factors live: beside its weight; where it runs if accelerate offloads it; on
    the CPU while it is on meta."""
    tensor: Tensor | None = next(host.parameters(), None)
    if tensor is None:
        tensor = next(host.buffers(), None)
    if tensor is not None and not tensor.is_meta:
        return tensor.device
    hook = vars(host).get("_hf_hook")
    devices = [getattr(each, "execution_device", None) for each in getattr(hook, "hooks", [hook])]
    return torch.device(next((device for device in devices if device is not None), "cpu"))

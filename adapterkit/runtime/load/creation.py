"""New adapters on a live model."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adapterkit.adapters.lora_config import LoraConfig
from adapterkit.adapters.resolve import Target
from adapterkit.errors import Problems, Refused, listed
from adapterkit.inits.protocol import Initialization
from adapterkit.runtime.layers import KINDS, part_class
from adapterkit.runtime.layers.parameter import new_parameter_part
from adapterkit.runtime.layers.tied import share
from adapterkit.runtime.load.initial_values import (
    ModuleStatistics,
    method_of,
    redistributed,
    start,
    statistics_for,
)
from adapterkit.runtime.parts import dora
from adapterkit.runtime.parts.copies import biases, copies, mirrors, parameter_of, value_parts
from adapterkit.runtime.parts.tokens import own_rows, token_parts
from adapterkit.runtime.quantized import stored
from adapterkit.runtime.replication import replicate, replicating
from adapterkit.runtime.site import Part
from adapterkit.runtime.state import Attached, State
from adapterkit.runtime.targets import (
    input_embedding,
    own_modules,
    resolve,
    resolve_saved,
    resolve_tokens,
)
from adapterkit.statistics.reader import Stats


def attach(
    state: State,
    config: LoraConfig | Mapping[str, Any],
    name: str,
    seed: int | None,
    dtype: torch.dtype | None,
    *,
    ephemeral_gpu_offload: bool = False,
    stats: Stats | None = None,
    strict: bool = False,
) -> None:
    """Add a new, trainable adapter; `Refused` before anything changes."""
    state.unused(name)
    config = LoraConfig.of(config)
    with replicating(state):
        replicate(state, config.layer_replication, "LoraConfig: layer_replication")
        config, parts = _new_parts(state, config, name, seed, dtype, ephemeral_gpu_offload, stats)
    adapter = Attached(name, config, trainable=True, base=state.base_name)
    adapter.base_fingerprint = state.base_fingerprint
    adapter.strict = strict
    for path, part in parts:
        state.add(adapter, path, part)
    state.adapters[name] = adapter


def _new_parts(
    state: State,
    config: LoraConfig,
    name: str,
    seed: int | None,
    dtype: torch.dtype | None,
    ephemeral_gpu_offload: bool,
    stats: Stats | None,
) -> tuple[LoraConfig, list[tuple[str, Part]]]:
    targets: Sequence[Target] = resolve(state.model, config)
    if config.dora:
        _check_dora(state, targets)
    method = method_of(config, targets)
    with statistics_for(method, targets, stats) as statistics:
        config, targets = redistributed(method, config, targets, statistics)
        parts = _factors(
            state, config, name, targets, method, statistics, seed, dtype, ephemeral_gpu_offload
        )
    heads = {target.path: target.tied for target in targets if target.tied is not None}
    parts = share(parts, heads, config.dropout)
    paths = [target.path for target in targets]
    return config, parts + new_values(state, config, name, paths, dtype)


def _factors(
    state: State,
    config: LoraConfig,
    name: str,
    targets: Sequence[Target],
    method: Initialization,
    statistics: ModuleStatistics,
    seed: int | None,
    dtype: torch.dtype | None,
    ephemeral_gpu_offload: bool,
) -> list[tuple[str, Part]]:
    generator = torch.Generator().manual_seed(torch.seed() if seed is None else seed)
    parts: list[tuple[str, Part]] = []
    further = Counter(target.path for target in targets)  # parameters of a module, after this one
    places = [
        (target, *member)
        for target in targets
        for member in KINDS[target.kind].members(target.path)
    ]
    for target, path, kind in places:
        host = state.modules[path]
        if target.leaf is not None:
            further[path] -= 1
            place = home(host), dtype
            part = new_parameter_part(name, target, method, generator, place, further[path])
            parts.append((path, part))
            continue
        kind = part_class(kind, config)
        a, b = start(method, target, kind, host, generator, statistics.of(path))
        where = home(host)
        part = kind(
            name,
            a.to(where, dtype),
            b.to(where, dtype),
            target.scale,
            dropout=config.dropout,
            bias=torch.zeros(b.shape[0], device=where) if config.lora_bias else None,
            initial=(a.clone().to(where, dtype), b.clone().to(where, dtype))
            if method.changes_base
            else None,
            ephemeral_gpu_offload=ephemeral_gpu_offload,
        )
        part.fix(*method.fixed)
        if config.dora:
            part.decompose(host, dtype)
        parts.append((path, part))
    return parts


def _check_dora(state: State, targets: Sequence[Target]) -> None:
    """`Refused` for layers without a DoRA, and for weights that cannot be read yet, or at all."""
    reasons: dict[str, list[str]] = {}
    for target in targets:
        host = state.modules[target.path]
        reason = dora.problem(host, KINDS[target.kind].axis)
        if reason is None and any(tensor.is_meta for tensor in stored(host)):
            reason = "magnitudes are norms of the weight, which is on the meta device"
        if reason is not None:
            reasons.setdefault(reason, []).append(target.path)
    Problems(
        [
            Refused(
                f"DoRA on {listed(paths)}: {reason}",
                expected="linear layers, embeddings or convolutions with values",
                where="attach",
                hint="exclude these layers, or attach without dora",
            )
            for reason, paths in reasons.items()
        ]
    ).raise_all()


def home(host: nn.Module) -> torch.device:
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


def new_values(
    state: State,
    config: LoraConfig,
    adapter: str,
    targets: Sequence[str],  # modules that get factors
    dtype: torch.dtype | None,  # of biases and rows; None: the base's
) -> list[tuple[str, Part]]:
    """The parts that a config asks for besides factors; `Refused` for values that the base, on the
    meta device, has not yet."""
    saved = resolve_saved(state.model, config)
    modules, embedding = own_modules(state.model), None
    rows = resolve_tokens(state.model, config)
    if rows:
        embedding = input_embedding(state.model, modules)
        rows = own_rows(modules, rows, embedding, config.tie)
    names = []
    if config.bias != "none":
        names = biases(state.modules, None if config.bias == "all" else targets)
        names = [name for name in names if not any(name.startswith(f"{x}.") for x in saved)]
    values = {name: parameter_of(state.modules, name) for name in names}
    weights = {path: parameter_of(modules, f"{path}.weight") for path in rows}
    tensors: dict[str, Tensor | None] = {**values, **weights}
    tensors |= {path: t for path in saved for t in state.modules[path].state_dict().values()}
    missing = [name for name, tensor in tensors.items() if tensor is None or tensor.is_meta]
    if missing:
        raise Refused(
            f"{listed(missing)} on the meta device",
            expected="values, with which those of the adapter start",
            where="attach",
            hint="load the base's weights first",
        )

    def start(tensor: Tensor | None) -> Tensor:
        assert tensor is not None
        return tensor.detach().to(dtype, copy=True)

    parts: list[tuple[str, Part]] = [*copies(state.modules, saved, adapter, config.tie)]
    parts += mirrors(state.modules, parts)
    starts = {name: start(value) for name, value in values.items()}
    parts += value_parts(state.modules, adapter, starts, trained=True, copied=saved)
    first = {
        path: (indices, start(weight[list(indices)]))
        for path, indices in rows.items()
        if (weight := weights[path]) is not None
    }
    return parts + token_parts(state.model, modules, adapter, first, embedding)

"""Read the deltas of an adapter of another type than LoRA, in PEFT's layout."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from adapterkit.adapters.kinds.dora_deltas import BaseWeights
from adapterkit.core.adapter.config import unmergeable_type
from adapterkit.core.adapter.keys import CONFIG
from adapterkit.core.adapter.record import Adapter
from adapterkit.core.checkpoint.folder import Folder
from adapterkit.core.checkpoint.spec import Checkpoint
from adapterkit.core.commands import CHECK_BASE
from adapterkit.core.errors import Problems, Refused, shown
from adapterkit.core.registry import members

if TYPE_CHECKING:
    from adapterkit.adapters.kinds.common import Delta, Kind

FLATTENED = (
    "convolutions with flattened kernels look like linear layers here: give --base if the model "
    "has any"
)


@dataclass(frozen=True)
class ModuleOfKind:
    """The delta of one module; `trailing_shape`: the axes of its weight after `out`."""

    module: str
    delta: "Delta"
    trailing_shape: tuple[int, ...]
    embedding: bool


def kind_of(source: Folder, config: Mapping) -> "type[Kind] | None":
    """The type of an adapter, None for LoRA and other folders. `Refused` for unknown ones."""
    peft_type = config.get("peft_type", "LORA")
    name = peft_type.lower() if isinstance(peft_type, str) else ""
    if name == "lora":
        return None
    known = members("kinds")
    if name in known:
        return known[name]
    expected = ", ".join(["LORA", *map(str.upper, known)])
    raise unmergeable_type(peft_type, expected, f"{source.name}/{CONFIG}")


def read_deltas(
    kind: "type[Kind]", source: Folder, base: Checkpoint | None, notes: list[str], errors: Problems
) -> tuple[Adapter, list[ModuleOfKind]]:
    """An adapter in the form of a LoRA's config, and its deltas. Pruned modules are left out with a
    note; refusals of modules join the errors."""
    from adapterkit.adapters.kinds.common import AdaptedModule, read_kind

    if kind.needs_base and base is None:
        raise Refused(
            f"a {kind.name.upper()} adapter without its base: {kind.needs_base}",
            expected="--base BASE",
            where=source.name,
            hint="give --base, the model it was trained on",
            code="AK402",
        )
    adapter, tensors = read_kind(kind, source, 0)
    if base is None and kind.name in ("loha", "lokr"):
        notes.append(FLATTENED)
    shared = tensors.pop("")
    weights = None if base is None else BaseWeights(base, adapter, list(tensors), notes)
    modules: list[ModuleOfKind] = []
    for module, parts in tensors.items():
        embedding = any("embedding" in part for part in parts)
        with errors.collected():
            weight = None if weights is None else weights.of(module, embedding)
            bias = weights and weights.names.parameter(f"{module}.bias")
            own = AdaptedModule(adapter, module, parts, shared, weight, bias is not None)
            delta = kind.from_module(own)
            if not delta.rank:
                notes.append(f"{shown(module)} has rank 0: left out")
                continue
            trailing_shape = tail_of(module, delta, weight and weight.weight_shape, adapter.name)
            modules.append(ModuleOfKind(module, delta, trailing_shape, embedding))
    bias = adapter.config.get("bias") or "none"
    config = adapter.config | {"bias": "lora_only" if bias.endswith("_only") else bias}
    return replace(adapter, config=config), modules


def unknown_kernel(module: str) -> Refused:
    return Refused(
        f"{shown(module)}: a kernel of which the file does not say if it is a Conv1d's or a "
        "Conv2d's",
        expected="--base BASE",
        where="options",
        hint="give the model it was trained on",
        code="AK402",
    )


def tail_of(
    module: str, delta: "Delta", shape: Sequence[int] | None, where: str
) -> tuple[int, ...]:
    """The axes of a weight after `out`, of the base's `shape` if known; `Refused` if they
    contradict each other or are unknown."""
    if shape is None:
        if delta.trailing_shape is not None:
            return delta.trailing_shape
        raise unknown_kernel(module)
    out, *trailing_shape = shape
    if delta.shape != (out, math.prod(trailing_shape)):
        raise Refused(
            f"{shown(module)}: a delta of {delta.shape}",
            expected=f"one for the base's {tuple(shape)}",
            where=where,
            hint=CHECK_BASE,
            code="AK401",
        )
    return tuple(trailing_shape)

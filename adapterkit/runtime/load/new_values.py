"""What a new adapter trains besides factors: copies of modules, biases and rows of tokens, which
start as the base's."""

from collections.abc import Sequence

import torch
from torch import Tensor

from adapterkit.adapters.lora_config import LoraConfig
from adapterkit.errors import Refused, listed
from adapterkit.runtime.parts.copies import biases, copies, mirrors, parameter_of, value_parts
from adapterkit.runtime.parts.tokens import own_rows, token_parts
from adapterkit.runtime.site import Part
from adapterkit.runtime.state import State
from adapterkit.runtime.targets import (
    input_embedding,
    own_modules,
    resolve_saved,
    resolve_tokens,
)


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

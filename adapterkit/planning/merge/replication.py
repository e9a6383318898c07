"""layer_replication: a deeper model whose layers are copies of the base's, as in SOLAR
(arXiv:2312.15166).

`[[0, 4], [2, 5]]` stacks layers 0..3, then 2..4. The adapter's module names count the new layers.
Here the base gets them as keys that point at the bytes of the copied layers, so the rest of a merge
needs no case for it.
"""

import json
import re
from dataclasses import replace
from typing import Any

from adapterkit.adapters.record import Adapter
from adapterkit.checkpoint.header import TensorSpec
from adapterkit.checkpoint.spec import Checkpoint
from adapterkit.errors import Problems, Refused, shown

OTHER_LISTS = re.compile(r"^architectures$|_token_ids?$")  # not one value for each layer
COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
LAYER = re.compile(r"^((?:.*\.)?(?:layers|layer|h|blocks)\.)(\d+)(\..*)$")


def replicated(base: Checkpoint, adapters: list[Adapter], errors: Problems) -> Checkpoint:
    """The base with its layers stacked anew; the base itself where no adapter has replicated
    layers, or where they do not fit, which joins the errors."""
    replicating = [a for a in adapters if a.config.get("layer_replication")]
    if not replicating:
        return base
    if len({json.dumps(a.config.get("layer_replication")) for a in adapters}) > 1:
        errors.add(
            "different layer_replication in the adapters",
            "the same in all",
            "merge those that agree",
            where=replicating[0].where,
        )
        return base
    ranges = replicating[0].config["layer_replication"]
    order = [i for start, end in ranges for i in range(start, end)]
    try:
        prefix, count = _layer_stack(base, order)
    except Refused as error:
        errors.append(error)
        return base
    tensors: dict[str, TensorSpec] = {}
    copies: dict[int, list[int]] = {}
    for new, old in enumerate(order):
        copies.setdefault(old, []).append(new)
    for key, spec in base.tensors.items():
        match = LAYER.match(key)
        if match is None or match[1] != prefix:
            tensors[key] = spec
            continue
        for new in copies.get(int(match[2]), ()):
            tensors[f"{prefix}{new}{match[3]}"] = spec
    config = stacked(base.config, count, order)
    return replace(base, tensors=tensors, config=config)


def _layer_stack(base: Checkpoint, order: list[int]) -> tuple[str, int]:
    """Prefix and number of the layers that can be replicated; `Refused` where that is no single
    stack, or where it has no layer of the order."""
    counts = {base.config[c] for c in COUNTS if isinstance(base.config.get(c), int)}
    text = base.config.get("text_config")
    counts |= {text[c] for c in COUNTS if isinstance(text, dict) and isinstance(text.get(c), int)}
    layers: dict[str, set[int]] = {}
    for key in base.tensors:
        match = LAYER.match(key)
        if match:
            layers.setdefault(match[1], set()).add(int(match[2]))
    stacks = [
        (prefix, len(numbers))
        for prefix, numbers in layers.items()
        if len(numbers) in counts and numbers == set(range(len(numbers)))
    ]
    if len(stacks) != 1:
        raise Refused(
            f"{len(stacks)} stacks of layers that could be replicated: "
            f"{', '.join(shown(prefix) for prefix, _ in stacks)}",
            expected="one stack with the config's number of layers",
            where=base.name,
            hint="this model's layers cannot be replicated",
        )
    bad = sorted({i for i in order if i >= stacks[0][1]})
    if bad or not order:
        raise Refused(
            f"layers {bad} of {stacks[0][1]}",
            expected="layers of the base",
            where="layer_replication",
            hint="use the base that the adapter was trained on",
        )
    return stacks[0]


def stacked(config: dict[str, Any], count: int, order: list[int]) -> dict[str, Any]:
    """A config with the new number of layers, and every per-layer list stacked as the layers
    are."""

    def setting(key: str, value: Any) -> Any:
        if key in COUNTS and value == count:
            return len(order)
        if isinstance(value, list) and len(value) == count and not OTHER_LISTS.search(key):
            return [value[i] for i in order]
        if isinstance(value, dict) and key.endswith("_config"):
            return {k: setting(k, v) for k, v in value.items()}
        return value

    return {k: setting(k, v) for k, v in config.items()}

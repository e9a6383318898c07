"""layer_replication: a deeper model whose layers are copies of the base's, as in SOLAR (arXiv:2312.15166).

`[[0, 4], [2, 5]]` stacks layers 0..3 and 2..4 anew. The adapter's module names count the new layers. Here the base is seen as if
it had them: each new key points at the bytes of the layer that it copies, so the rest of a merge needs to know nothing of it.
"""

import json
import re
from dataclasses import replace
from typing import Any

from adapterkit.adapters.record import Adapter
from adapterkit.checkpoint.header import TensorSpec
from adapterkit.checkpoint.spec import Checkpoint
from adapterkit.errors import AdapterkitError, Refused, shown

COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
LAYER = re.compile(r"^((?:.*\.)?(?:layers|layer|h|blocks)\.)(\d+)(\..*)$")


def replicated(
    base: Checkpoint, adapters: list[Adapter], errors: list[AdapterkitError]
) -> Checkpoint:
    """The base with its layers stacked anew; the base itself where nothing asks for it."""
    asked = {json.dumps(a.config.get("layer_replication")) for a in adapters}
    asked_by = [a for a in adapters if a.config.get("layer_replication")]
    if not asked_by:
        return base
    where = asked_by[0].where
    if len(asked) > 1:
        errors.append(
            Refused(
                "different layer_replication in the adapters",
                expected="the same in all",
                where=where,
                hint="merge those that agree",
            )
        )
        return base
    order = [i for start, end in asked_by[0].config["layer_replication"] for i in range(start, end)]
    home = _layers_home(base, order)
    if isinstance(home, AdapterkitError):
        errors.append(home)
        return base
    prefix, count = home
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
    config = _config(base.config, count, order)
    return replace(base, tensors=tensors, config=config)


def _layers_home(base: Checkpoint, order: list[int]) -> tuple[str, int] | AdapterkitError:
    counts = {base.config[c] for c in COUNTS if isinstance(base.config.get(c), int)}
    text = base.config.get("text_config")
    counts |= {text[c] for c in COUNTS if isinstance(text, dict) and isinstance(text.get(c), int)}
    found: dict[str, set[int]] = {}
    for key in base.tensors:
        match = LAYER.match(key)
        if match:
            found.setdefault(match[1], set()).add(int(match[2]))
    homes = [
        (prefix, len(at))
        for prefix, at in found.items()
        if len(at) in counts and at == set(range(len(at)))
    ]
    if len(homes) != 1:
        return Refused(
            f"{len(homes)} stacks of layers that could be replicated: {', '.join(shown(h) for h, _ in homes)}",
            expected="one stack with the config's number of layers",
            where=base.name,
            hint="this model's layers cannot be replicated",
        )
    bad = sorted({i for i in order if i >= homes[0][1]})
    if bad or not order:
        return Refused(
            f"layers {bad} of {homes[0][1]}",
            expected="layers of the base",
            where="layer_replication",
            hint="use the base that the adapter was trained on",
        )
    return homes[0]


def _config(config: dict[str, Any], count: int, order: list[int]) -> dict[str, Any]:
    """The config with the new number of layers, and every per-layer list stacked as the layers are."""

    def stacked(key: str, value: Any) -> Any:
        if key in COUNTS and value == count:
            return len(order)
        if isinstance(value, list) and len(value) == count and key not in ("architectures",):
            return [value[i] for i in order]
        if isinstance(value, dict) and key.endswith("_config"):
            return {k: stacked(k, v) for k, v in value.items()}
        return value

    return {k: stacked(k, v) for k, v in config.items()}

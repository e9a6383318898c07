"""Any module in a mixed batch: the site runs on the rows of one adapter at a time."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from adapterkit.errors import Refused, shown
from adapterkit.runtime.site import Site

Narrowed = Callable[[Sequence[int], Tensor, int], AbstractContextManager[None]]

# nn.MultiheadAttention's arguments, in order
ATTENTION = (
    "query key value key_padding_mask need_weights attn_mask average_attn_weights is_causal".split()
)


def run_groups(
    site: Site,
    names: Sequence[str | None],
    axis: int,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    narrowed: Narrowed,  # around the run of some of the rows
) -> Any:
    """Run the site on the rows of one adapter at a time, and put the outputs together."""
    if isinstance(site.host, nn.MultiheadAttention):
        args, kwargs = (), {**dict(zip(ATTENTION, args, strict=False)), **kwargs}
    if any(hasattr(value, "get_seq_length") for value in (*args, *kwargs.values())):
        raise Refused(
            f"a cache of all rows for {shown(site.path)}, which runs for some of them at a time",
            expected="modules that read no cache",
            where="rows",
            hint="give use_cache=False, or run these adapters one at a time with activate",
        )
    x = args[0] if args else next(iter(kwargs.values()))
    size = x.shape[axis]
    repeat = size // len(names)
    groups: dict[str | None, list[int]] = {}
    for row, name in enumerate(names):
        groups.setdefault(name, []).append(row)
    indices, outputs = [], []
    for name, rows in groups.items():
        index = torch.tensor(rows, device=x.device)[:, None] * repeat
        index = (index + torch.arange(repeat, device=x.device)).flatten()
        own_args = [select(value, index, size, axis) for value in args]
        own_kwargs = {
            key: _argument(site.host, key, value, index, size, axis)
            for key, value in kwargs.items()
        }
        with narrowed(rows, index, size):
            outputs.append(run_alone(site, name, own_args, own_kwargs))
        indices.append(index)
    if isinstance(site.host, nn.MultiheadAttention):
        first, weights = zip(*outputs, strict=True)  # weights have the rows first
        return join(first, indices, axis, site.path), join(weights, indices, 0, site.path)
    return join(outputs, indices, axis, site.path)


def _argument(host: nn.Module, key: str, value: Any, index: Tensor, size: int, axis: int) -> Any:
    """The rows of an argument; an attention's masks have them first, 3-D ones for each head."""
    if isinstance(host, nn.MultiheadAttention) and key.endswith("_mask"):
        if key == "attn_mask" and isinstance(value, Tensor) and value.ndim == 3:
            return select(value.unflatten(0, (size, -1)), index, size, 0).flatten(0, 1)
        return value if key == "attn_mask" else select(value, index, size, 0)
    return select(value, index, size, axis)


def run_alone(site: Site, name: str | None, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The site's output with one adapter, or with none."""
    router, site.router = site.router, None
    site.select({} if name is None else {name: 1.0})
    try:
        return site.forward(*args, **kwargs)
    finally:
        site.select({})
        site.router = router
        keep_unfused(site)


def select(value: Any, index: Tensor, size: int, axis: int) -> Any:
    """The rows of every tensor with that many rows, in lists and maps too."""
    if isinstance(value, Tensor):
        if value.ndim <= axis or value.shape[axis] != size:
            return value
        return value.index_select(axis, index.to(value.device))
    if isinstance(value, tuple | list):
        return type(value)(select(item, index, size, axis) for item in value)
    if isinstance(value, dict):
        return {key: select(item, index, size, axis) for key, item in value.items()}
    return value


def join(outputs: Sequence[Any], indices: Sequence[Tensor], axis: int, path: str) -> Any:
    """The outputs of all groups as one: tensors row by row, in tuples and maps too."""
    first = outputs[0]
    if isinstance(first, Tensor):
        sizes = [output.shape[axis] if output.ndim > axis else 0 for output in outputs]
        # (rows * tokens, ...), as some routers of experts give (rows, tokens, ...) back
        tokens = max(sizes[0] // len(indices[0]), 1) if axis == 0 else 1
        if sizes != [tokens * len(index) for index in indices]:
            raise Refused(
                f"an output {tuple(first.shape)} of {shown(path)} that is not one for each row",
                expected="outputs whose rows are those of the batch",
                where="rows",
                hint="exclude this module from the adapters, or run them one at a time",
            )
        order = torch.cat(list(indices)).argsort()
        if tokens > 1:
            order = (order[:, None] * tokens + torch.arange(tokens, device=order.device)).flatten()
        return torch.cat(list(outputs), axis).index_select(axis, order)
    if isinstance(first, tuple | list):
        joined = [join(items, indices, axis, path) for items in zip(*outputs, strict=True)]
        return type(first)(*joined) if hasattr(first, "_fields") else type(first)(joined)
    if isinstance(first, dict):
        return type(first)(
            **{key: join([o[key] for o in outputs], indices, axis, path) for key in first}
        )
    return first


def keep_unfused(site: Site) -> None:
    """Torch's fused layers read the weights of their modules unless one of these has hooks."""
    if not site._forward_pre_hooks:
        site.register_forward_pre_hook(lambda *args: None)

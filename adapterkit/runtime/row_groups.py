"""Any module in a mixed batch: the site runs on the rows of one adapter at a time."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from adapterkit.errors import Refused, shown
from adapterkit.runtime.layers.invoked import InvokedPart
from adapterkit.runtime.site import Site


def run_groups(
    site: Site,
    names: Sequence[str | None],
    axis: int,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Any:
    """Run the site on the rows of one adapter at a time, and put the outputs together."""
    x = args[0] if args else next(iter(kwargs.values()))
    size = x.shape[axis]
    repeat = size // len(names)
    groups: dict[str | None, list[int]] = {}
    for row, name in enumerate(names):
        groups.setdefault(name, []).extend(range(row * repeat, (row + 1) * repeat))
    indices, outputs = [], []
    for name, members in groups.items():
        index = torch.tensor(members, device=x.device)
        own_args = [select(value, index, size, axis) for value in args]
        own_kwargs = {key: select(value, index, size, axis) for key, value in kwargs.items()}
        with narrowed(site, name, index, size):
            outputs.append(run_alone(site, name, own_args, own_kwargs))
        indices.append(index)
    return join(outputs, indices, axis, site.path)


def narrowed(
    site: Site, name: str | None, index: Tensor, size: int
) -> AbstractContextManager[None]:
    """An aLoRA's view of the rows of one group."""
    parts = () if name is None else site.parts.get(name, {}).values()
    invoked = next((part for part in parts if isinstance(part, InvokedPart)), None)
    return nullcontext() if invoked is None else invoked.invocations.narrowed(index, size)


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
                hint="leave this module out of the adapters, or run them one at a time",
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

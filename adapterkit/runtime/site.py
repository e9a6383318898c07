"""A site: all adapters of one module of the model, as a child of that module.

The module keeps its name, class, parameters and state dict. The site replaces the module's
`forward` (an attribute of the instance), is found by `model.parameters()`, `.to()` and `.train()`
like any child, and adds nothing to `state_dict()`.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

CHILD = "adapterkit"  # the name of the child


class Unsaved(nn.Module):
    """A module whose parameters and buffers are in no state dict."""

    def state_dict(self, *args: Any, destination: Any = None, **kwargs: Any) -> Any:
        return {} if destination is None else destination

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        return

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """As `nn.Module`'s, but `to_empty`, with which a base arrives from the meta device, leaves
        the adapters' values as they are."""
        probe = torch.arange(1.0, 65.0)  # whole numbers that every float dtype holds
        moved = fn(probe)
        if moved.is_meta or torch.equal(moved.cpu().float(), probe):
            return super()._apply(fn, recurse)
        return super()._apply(lambda t: t.to(moved.device), recurse)


class Part(Unsaved):
    """One adapter's share of one module.

    A delta part changes the output y so far: `forward(y, weight, x, ...) -> y`. A replacing part
    runs in place of the module: `run(site, x, ...) -> y`.
    """

    role: ClassVar[str] = "delta"
    adapter: str  # its name

    def run(self, site: "Site", *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def merge(self, values: dict[str, Tensor], weight: float) -> None:
        """Change the host's parameters, float32 or wider by name, as this part changes the
        output."""
        raise NotImplementedError

    def unmergeable(self, site: "Site", weight: float) -> str | None:
        """Why no weights of the host give this part's output with that weight; None if some do."""
        return None

    def rescale(self, factor: float) -> None:
        """Multiply its scale, where it has one."""

    def stored(self, path: str) -> dict[str, Tensor]:
        """Its tensors by their keys in a file; `path`: the module's."""
        raise NotImplementedError


class Site(Unsaved):
    """The adapters of one module, the host: which parts it has, and which of them act."""

    _host: tuple[nn.Module]

    def __init__(self, host: nn.Module, path: str):
        super().__init__()
        # in a tuple: a child of its own child would be a ring
        object.__setattr__(self, "_host", (host,))
        self.path = path
        self.parts: dict[str, dict[str, Part]] = {}  # adapter -> role -> part
        self.replacing: Part | None = None
        self.adding: tuple[tuple[Part, float], ...] = ()
        self.router: Callable[..., Any] | None = None  # decides per batch row; see `rows`
        self._own_forward = host.__dict__.get("forward")
        host.add_module(CHILD, self)
        host.forward = self.forward
        # torch's fused layers read the weights of their parts unless one of these has hooks
        self.register_forward_pre_hook(_nothing)

    @property
    def host(self) -> nn.Module:
        return self._host[0]

    def base(self, *args: Any, **kwargs: Any) -> Any:
        """The host's own forward."""
        if self._own_forward is not None:
            return self._own_forward(*args, **kwargs)
        host = self._host[0]
        return type(host).forward(host, *args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.router is not None:
            return self.router(self, args, kwargs)
        if self.replacing is None:
            y = self.base(*args, **kwargs)
        else:
            y = self.replacing.run(self, *args, **kwargs)
        if not self.adding:
            return y
        x = args[0] if args else next(iter(kwargs.values()))
        dtype = y.dtype
        for part, weight in self.adding:
            y = part(y, weight, x)
        return y if y.dtype == dtype else y.to(dtype)

    def add(self, part: Part) -> None:
        """Add a part of an adapter; it does not act yet."""
        self.parts.setdefault(part.adapter, {})[part.role] = part
        self.add_module(_child_name(part), part)

    def remove(self, adapter: str) -> None:
        for part in self.parts.pop(adapter, {}).values():
            del self._modules[_child_name(part)]

    def select(self, active: Mapping[str, float]) -> None:
        """Let the parts of these adapters act, each with its weight, in this order."""
        adding, replacing = [], None
        for adapter, weight in active.items():
            for part in self.parts.get(adapter, {}).values():
                if part.role.startswith("delta"):
                    adding.append((part, weight))
                else:
                    replacing = part
        self.replacing, self.adding = replacing, tuple(adding)

    def leave(self) -> None:
        """Give the host its own forward back."""
        host = self.host
        del host._modules[CHILD]
        if self._own_forward is None:
            del host.forward
        else:
            host.forward = self._own_forward


def _child_name(part: Part) -> str:
    """A child's name has no dots; the adapter's may."""
    name = part.adapter.replace(".", "_")
    return name if part.role == "delta" else f"{name}:{part.role.replace('.', '_')}"


def _nothing(*args: Any) -> None:
    return

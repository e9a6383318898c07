"""A site: all adapters of one module of the model, as a child of that module.

The module keeps its name, class, parameters and state dict. The site replaces the module's
`forward` (an attribute of the instance), is found by `model.parameters()`, `.to()` and `.train()`
like any child, and adds nothing to `state_dict()`.
"""

import itertools
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adapterkit.core.records import Json
from adapterkit.runtime.sharding import spread
from adapterkit.runtime.weights import weight_on

CHILD = "adapterkit"  # the name of the child
DIRECTED = ":directions"  # how the name of a patch's stand-in ends
OLD_FORWARD = "_old_forward"  # called by accelerate's hooks
ESCAPED = str.maketrans({"%": "%25", ".": "%2E", ":": "%3A"})  # in children's names
RESERVED = {  # the site's attributes
    "patches", "path", "unmerged", "router", "replacing", "changing", "adding", "training", "sizes",
    "watched", "called", "active", "directed",
}  # fmt: skip
SIZES = (
    "num_embeddings", "embedding_dim", "in_features", "out_features", "in_channels", "out_channels",
)  # fmt: skip
_exchange = threading.RLock()  # two threads must not exchange one module's parameters at a time

_probes = itertools.count()


class Unsaved(nn.Module):
    """A module whose parameters and buffers are excluded from state dicts."""

    def state_dict(self, *args: object, destination: object = None, **kwargs: object) -> Any:
        return {} if destination is None else destination

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        return

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """As `nn.Module`'s, except that `to_empty`, which moves a base from the meta device, keeps
        the adapters' values."""
        # numbers that every float dtype holds, others each time: new memory may hold older ones
        count = next(_probes)
        probe = torch.tensor([1.0 + (count >> i & 1) for i in range(64)])
        moved = fn(probe)
        if moved.is_meta or torch.equal(moved.cpu().float(), probe):
            return super()._apply(fn, recurse)
        return super()._apply(lambda t: t.to(moved.device), recurse)


class Patch(Unsaved):
    """One adapter's share of one module.

    A delta patch changes the output y so far: `forward(y, weight, x, ...) -> y`. A weight patch
    changes the module's parameters while its forward runs: `change(values, weight)`. A replacing
    patch runs instead of the module: `run(site, x, ...) -> y`, where `site.base` is the module.
    """

    role: str = "delta"  # its beginning is the kind: delta, weight, or another word
    adapter: str  # its name
    replaces: bool = False  # whether its values replace the host's own
    called: bool = True  # whether its host is called, as far as the code around it shows
    fixed: frozenset[str] = frozenset()  # parameters that are never trained
    _host: tuple[nn.Module]

    @classmethod
    def place(cls, path: str) -> str:
        """The path of the site for a patch of the module `path`."""
        return path

    @property
    def host(self) -> nn.Module:
        """The module that it is on."""
        return self._host[0]

    @property
    def site(self) -> "Site":
        site = self._host[0]._modules[CHILD]
        assert isinstance(site, Site)
        return site

    def named(self, path: str) -> str:
        """The module or parameter as weights name it; `path`: the site's."""
        return path

    def undirected(self, weights: Sequence[float]) -> str | None:
        """The reason why it cannot act with these weights of its delta's directions, or None."""
        return "it has no low-rank factors"

    def directed(self, weights: tuple[float, ...]) -> "Patch":
        """The patch that acts with these weights of its delta's directions; called only if
        `undirected` gives no reason."""
        raise NotImplementedError

    def weighted(self, weight: float) -> "tuple[Patch, float]":
        """The patch that acts with an adapter's weight, and its own weight."""
        own = weight_on(weight, self.named(self.site.path))
        return (self.directed(own), 1.0) if isinstance(own, tuple) else (self, own)

    def change(self, values: "Values", weight: float) -> None:
        """Change parameters of the host during one call of its forward."""
        raise NotImplementedError

    def check(self, values: "Values") -> None:
        """Check the parameters that it changed, after the call."""

    def fix(self, *names: str) -> None:
        """Stop training these parameters."""
        self.fixed |= set(names)
        for name in names:
            parameter = self.get_parameter(name)
            parameter.requires_grad_(False)
            parameter.grad = None

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Its parameters that are not fixed."""
        for name, parameter in self.named_parameters():
            if name not in self.fixed:
                yield name, parameter

    def tensors(self) -> dict[str, Tensor]:
        """Its parameters and buffers by name."""
        return {**dict(self.named_parameters()), **dict(self.named_buffers())}

    def requires_grad_(self, requires_grad: bool = True) -> "Patch":
        for _, parameter in self.trained():
            parameter.requires_grad_(requires_grad)
        return self

    def run(self, site: "Site | Inside", *args: object, **kwargs: object) -> Any:
        raise NotImplementedError

    def clash(self, other: "Patch") -> str | None:
        """The reason why it cannot act together with another patch of the same module, or None."""
        return None

    def covers(self, other: "Patch") -> bool:
        """Return whether its values hide another patch's merged changes to the host."""
        return self.replaces and not other.replaces

    def values_in(self, other: "Patch") -> dict[str, Tensor]:
        """Another patch's values, as it was read, in the form of its own parameters and buffers."""
        return other.tensors()

    def fits(self, other: "Patch") -> bool:
        """Return whether `take` accepts another patch's values."""
        own, values = self.tensors(), self.values_in(other)
        return {name for name, _ in self.named_parameters()} <= values.keys() <= own.keys() and all(
            value.shape == own[name].shape for name, value in values.items()
        )

    @torch.no_grad()
    def take(self, other: "Patch") -> None:
        """Copy the values of another patch, as it was read."""
        own = self.tensors()
        for name, value in self.values_in(other).items():
            own[name].copy_(spread(value.to(own[name]), own[name]))

    def own_value(self, name: str) -> Tensor | None:
        """A parameter of the module that runs instead of the host."""
        return None

    def merge(self, values: dict[str, Tensor], weight: float) -> None:
        """Change the host's parameters, float32 or wider, as this patch changes the output."""
        raise NotImplementedError

    def unmergeable(self, site: "Site", weight: float) -> str | None:
        """The reason why no weights of the host give this patch's weighted output, or None."""
        return None

    def rescale(self, factor: float) -> None:
        """Multiply its scale, if it has one."""

    def stored(self, path: str) -> dict[str, Tensor]:
        """Its tensors by their keys in a file; `path`: the module's."""
        raise NotImplementedError


class Values(Json):
    """Parameters of a module by name, as they are in one call of its forward."""

    def __init__(self, host: nn.Module):
        super().__init__()
        self.host = host

    def __missing__(self, name: str) -> Any:
        module, leaf = owner(self.host, name)
        return module._parameters.get(leaf)


def owner(host: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that owns a parameter of the host, and the name there."""
    path, _, leaf = name.rpartition(".")
    return host.get_submodule(path), leaf


def sizes_of(host: nn.Module) -> dict[str, int]:
    """The sizes in a layer's attributes, because parameters' shapes differ if they are sharded."""
    own = vars(host)
    return {name: own[name] for name in SIZES if name in own}


Host = Any  # a module, with the attributes of its class
Args = Sequence[Any]  # of a call of a module
Kwargs = Mapping[str, Any]
Replacing = tuple[Patch, ...]
Changing = tuple[tuple[Patch, float], ...]


class Steps(dict[str, nn.Module]):
    """The children of a Sequential without the site, which is no step to run."""

    def values(self) -> Any:
        return [module for name, module in self.items() if name != CHILD]

    def __len__(self) -> int:
        return super().__len__() - (CHILD in self)


class Site(Unsaved):
    """The adapters of one module, the host: its patches, and which of them act."""

    _host: tuple[nn.Module]
    replacing: Replacing  # active patches, each around those before it
    changing: Changing
    adding: tuple[tuple[Patch, float], ...]

    def __init__(self, host: nn.Module, path: str):
        super().__init__()
        # in a tuple: a child of its own child would be a ring
        object.__setattr__(self, "_host", (host,))
        self.path, self.sizes = path, sizes_of(host)
        self.patches: dict[str, dict[str, Patch]] = {}  # adapter -> role -> patch
        self.unmerged: dict[str, Tensor] = {}  # the values before the merge
        self.watched = self.called = False  # see `FirstCallWatch`
        self.active: Mapping[str, float] = {}
        self.router: Callable[..., Any] | None = None  # decides per batch row; see `rows`
        self.select({})
        # inside accelerate's hooks, which bring weights and inputs to one device and may be removed
        slot = OLD_FORWARD if {"_hf_hook", OLD_FORWARD} <= vars(host).keys() else "forward"
        self.own_forward = vars(host).get(slot)
        if isinstance(host, nn.Sequential):
            host._modules = Steps(host._modules)
        host.add_module(CHILD, self)
        setattr(host, slot, self.forward)

    @property
    def host(self) -> nn.Module:
        return self._host[0]

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """Its patches; none for accelerate's hooks, which offload these and would restore them from
        the state dict, where they are missing."""
        caller = sys._getframe(1).f_globals.get("__name__")
        return iter(()) if caller == "accelerate.hooks" else super().named_children()

    def value(self, name: str) -> Tensor | None:
        """A parameter of the host."""
        return Values(self.host)[name]

    def base(self, *args: object, **kwargs: object) -> Any:
        """The host's own forward."""
        if self.own_forward is not None:
            return self.own_forward(*args, **kwargs)
        host = self._host[0]
        return type(host).forward(host, *args, **kwargs)

    @property
    def is_plain(self) -> bool:
        """Return whether the output so far is nn.Linear's own, with no other reference to it."""
        return type(self._host[0]) is nn.Linear and self.own_forward is None and not self.replacing

    def run(self, replacing: Replacing, changing: Changing, *args: object, **kwargs: object) -> Any:
        """Run the outermost replacing patch around the others, and these around the host's own
        forward with the changes of weight patches."""
        if replacing:
            *others, outer = replacing
            inside = Inside(self, tuple(others), changing) if others or changing else self
            return outer.run(inside, *args, **kwargs)
        if changing:
            return self._changed(changing, *args, **kwargs)
        return self.base(*args, **kwargs)

    def forward(self, *args: object, **kwargs: object) -> Any:
        if not torch.compiler.is_compiling():
            self.renew()
            if self.watched:
                self.watched, self.called = False, True
        if self.router is not None:
            return self.router(self, args, kwargs)
        y = self.run(self.replacing, self.changing, *args, **kwargs)
        if not self.adding:
            return y
        x = args[0] if args else next(iter(kwargs.values()))
        dtype = y.dtype
        for patch, weight in self.adding:
            y = patch(y, weight, x)
        return y if y.dtype == dtype else y.to(dtype)

    def _changed(self, changing: Changing, *args: object, **kwargs: object) -> Any:
        """The host's own forward with the parameters changed by weight patches."""
        if torch.compiler.is_compiling():  # traced by one thread
            return self._exchanged(changing, *args, **kwargs)
        with _exchange:
            return self._exchanged(changing, *args, **kwargs)

    def _exchanged(self, changing: Changing, *args: object, **kwargs: object) -> Any:
        values = Values(self.host)
        for patch, weight in changing:
            patch.change(values, weight)
        places = [owner(self.host, name) for name in values]
        own = [module._parameters[leaf] for module, leaf in places]
        try:
            for (module, leaf), parameter, value in zip(places, own, values.values(), strict=True):
                if parameter is not None and value.dtype != parameter.dtype:
                    value = value.to(parameter.dtype)  # rounded once, after the last patch
                module._parameters[leaf] = value
            y = self.base(*args, **kwargs)
        finally:
            for (module, leaf), parameter in zip(places, own, strict=True):
                module._parameters[leaf] = parameter
        is_empty = isinstance(y, Tensor) and y.numel() == 0  # no tokens: nothing was computed
        if not torch.compiler.is_compiling() and not is_empty:
            for patch, _ in changing:
                patch.check(values)
        return y

    def own_patches(self, adapter: str) -> Iterable[Patch]:
        """The patches of an adapter here."""
        return self.patches.get(adapter, {}).values()

    def add(self, patch: Patch) -> None:
        """Add a patch of an adapter; it does not act yet."""
        object.__setattr__(patch, "_host", self._host)
        self.patches.setdefault(patch.adapter, {})[patch.role] = patch
        self._modules[_child_name(patch)] = patch

    def remove(self, adapter: str) -> None:
        for patch in self.patches.pop(adapter, {}).values():
            del self._modules[_child_name(patch)]

    def select(self, active: Mapping[str, float]) -> None:
        """Activate the patches of these adapters, each with its weight, in this order."""
        adding, changing, replacing = [], [], []
        self.active = dict(active)
        for name in [name for name in self._modules if name.endswith(DIRECTED)]:
            del self._modules[name]
        for adapter, weight in active.items():
            for patch in self.patches.get(adapter, {}).values():
                acts, own = patch.weighted(weight)
                if acts is not patch:
                    self._modules[_child_name(patch) + DIRECTED] = acts
                if patch.role.startswith("delta"):
                    adding.append((acts, own))
                elif patch.role.startswith("weight"):
                    changing.append((acts, own))
                else:
                    replacing.append(patch)
        changing.sort(key=lambda pair: not pair[0].replaces)
        self.replacing, self.changing = nested(replacing), tuple(changing)
        self.adding = tuple(adding)
        self.directed = any(name.endswith(DIRECTED) for name in self._modules)
        self._forward_pre_hooks.clear()
        if adding or changing or replacing:
            self.keep_unfused()

    def keep_unfused(self) -> None:
        """Add a hook, because torch's fused layers read the weights of modules that have none."""
        if not self._forward_pre_hooks:
            self.register_forward_pre_hook(nothing)

    def renew(self) -> None:
        """Replace directed copies of patches whose values have changed."""
        if not self.directed:
            return
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            return  # a graph waits for nothing
        patches = [(p, w) for name, w in self.active.items() for p in self.own_patches(name)]
        if any(p.weighted(w)[0] not in self._modules.values() for p, w in patches):
            self.select(self.active)

    @property
    def replacements(self) -> dict[str, Tensor]:
        """Values that replace parameters of the host before anything is added: those of patches,
        and the originals during a merge."""
        values = Values(self.host)
        for patch, weight in self.changing:
            if patch.replaces:
                patch.change(values, weight)
        return {**self.unmerged, **values}

    @property
    def acts(self) -> bool:
        """Return whether its forward differs from the host's own."""
        return bool(self.router or self.replacing or self.changing or self.adding)

    def forward_slots(self) -> list[str]:
        """The host's attributes that are this site's forward; none if another wrapped it."""
        own = vars(self.host)
        return [slot for slot in ("forward", OLD_FORWARD) if own.get(slot) == self.forward]

    def leave(self) -> None:
        """Restore the host's own forward."""
        host = self.host
        del host._modules[CHILD]
        if isinstance(host._modules, Steps):
            host._modules = dict(host._modules)
        set_forward(host, self.forward_slots(), self.own_forward)


def set_forward(host: nn.Module, slots: Iterable[str], forward: Callable[..., Any] | None) -> None:
    """Restore a module's forward that a site replaced; None: that of its class."""
    for slot in slots:
        if forward is None and slot == "forward":
            del host.forward
        else:
            setattr(host, slot, forward or type(host).forward.__get__(host))


@dataclass(frozen=True)
class Inside:
    """A site as seen by the outer one of its replacing patches."""

    site: Site
    replacing: Replacing
    changing: Changing

    @property
    def host(self) -> nn.Module:
        return self.site.host

    def value(self, name: str) -> Tensor | None:
        """A parameter of the host as its forward, or that of its copy, sees it."""
        for patch in reversed(self.replacing):
            if (value := patch.own_value(name)) is not None:
                return value
        values = Values(self.host)
        for patch, weight in self.changing:
            patch.change(values, weight)
        return values[name]

    def base(self, *args: object, **kwargs: object) -> Any:
        """The forward that the outer patch replaces."""
        return self.site.run(self.replacing, self.changing, *args, **kwargs)


def nested(patches: Iterable[Patch]) -> Replacing:
    """Replacing patches in the order of `Site.run`: copies of the module inside token rows."""
    return tuple(sorted(patches, key=lambda patch: patch.role != "copy"))


def _child_name(patch: Patch) -> str:
    """The adapter's name, if it can be a child's: no dots, no attribute of the site; every role
    except the plain one is appended."""
    name = patch.adapter.translate(ESCAPED)
    if patch.role != "delta":
        return f"{name}:{patch.role.replace('.', '%2E')}"
    return f"{name}%" if hasattr(Site, name) or name in RESERVED else name


def nothing(*args: object) -> None:
    return

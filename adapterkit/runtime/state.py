"""The adapters of a model: their modules, and which of them act."""

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from adapterkit.core.checkpoint.fingerprint import fingerprint
from adapterkit.core.checkpoint.folder import LocalFolder
from adapterkit.core.checkpoint.spec import Checkpoint, open_checkpoint
from adapterkit.core.errors import AdapterkitError, Problems, Refused, did_you_mean, listed, shown
from adapterkit.runtime.guard import FirstCallWatch, Guard
from adapterkit.runtime.layers.alora import Invocations, InvokedPatch
from adapterkit.runtime.quantized import allow_packed, decompress, keep_unpacked
from adapterkit.runtime.site import CHILD, Args, Host, Kwargs, Patch, Site
from adapterkit.verbs.shared.lora_config import LoraConfig

if TYPE_CHECKING:
    from adapterkit.runtime.load.store import Store
    from adapterkit.runtime.merging import ReplacedWeights
    from adapterkit.runtime.replication import Replication
    from adapterkit.runtime.rows import Rows


@dataclass
class Attached:
    """One adapter on the model."""

    name: str
    config: LoraConfig
    trainable: bool
    base: str | None = None  # the base's id, as its config says
    sites: dict[str, Site] = field(default_factory=dict)  # by path
    base_fingerprint: str | None = None
    base_change: str | None = None
    rescaled: float = 1.0  # the product of the factors of `rescale`
    strict: bool = False  # patches that do nothing are an error, not a warning
    watch: FirstCallWatch | None = None  # since it was active first

    def patches(self) -> Iterator[tuple[Site, Patch]]:
        for site in self.sites.values():
            for patch in site.patches[self.name].values():
                yield site, patch


class State:
    """A model with its sites and adapters; the functions of the runtime change it.

    The base's parameters are frozen until `release` restores their flags.
    """

    def __init__(self, model: nn.Module):
        decompress(model)
        self.model = model
        self.sites: dict[str, Site] = {}
        self.adapters: dict[str, Attached] = {}
        self.active: dict[str, float] = {}
        self.merged: dict[str, float] = {}
        self.merge: ReplacedWeights | None = None  # weights that `merged` replaced
        self.rows: Rows | None = None  # the mixed batch in progress
        self.store: Store | None = None  # of adapters that are not loaded
        self.invocations: Invocations | None = None  # while there is an aLoRA
        self.replication: Replication | None = None  # of layers
        self.find_modules()
        self.encoders = Encoders(model)
        self.guard = Guard(model, self.sites, self.acting)
        self._unpacked: list[nn.Module] = []  # 4-bit layers, while adapters are trained
        # by place: a base that arrives from the meta device, or is sharded, has other parameters
        self._flags = [
            (module, leaf, parameter.requires_grad)
            for module in model.modules()
            for leaf, parameter in module._parameters.items()
            if parameter is not None
        ]
        for parameter in model.parameters():
            parameter.requires_grad_(False)

    @property
    def base_name(self) -> str | None:
        """The id of a transformers model, for an adapter's config."""
        return getattr(getattr(self.model, "config", None), "_name_or_path", None) or getattr(
            self.model, "name_or_path", None
        )

    @cached_property
    def base_fingerprint(self) -> str | None:
        """The fingerprint of the folder that a transformers model was loaded from, or None."""
        return self.of_base(fingerprint)

    def of_base(self, find: Callable[[Checkpoint], Any]) -> Any:
        """`find` of that folder, or None."""
        path = self.base_name
        try:
            if not isinstance(path, str) or not os.path.isfile(os.path.join(path, "config.json")):
                return None
            return find(open_checkpoint(LocalFolder(path)))
        except (AdapterkitError, OSError):
            return None

    def find_modules(self) -> None:
        """Find the model's modules by path, while it has no sites."""
        self.modules = dict(self.model.named_modules(remove_duplicate=False))

    def unreplicate(self) -> None:
        """Give the model its own layers back."""
        if self.replication is not None:
            self.replication.undo()
            self.replication = None

    def site(self, path: str) -> Site:
        """The site of a module, created if needed."""
        host = self.modules[path]
        site = host._modules.get(CHILD)
        if site is None:
            site = Site(host, path)
            site.train(host.training)
            self.sites[path] = site
            self.guard.hosts.reset()
        assert isinstance(site, Site)
        return site

    def acting(self) -> Collection[str]:
        """The adapters that act in the next call of the model."""
        return self.active if self.rows is None else self.rows.acting

    def rows_of(self, name: str, size: int) -> Sequence[int]:
        """The rows that an acting adapter acts on, in a call of that size."""
        if self.rows is None:
            return range(size)
        names = self.rows.names  # each for as many rows as there are beams
        return [row for row in range(size) if names[row * len(names) // size] == name]

    def add(self, adapter: Attached, path: str, patch: Patch) -> None:
        site = self.site(patch.place(path))
        patch.train(site.training)
        if torch.float64 in {p.dtype for p in site.host._parameters.values() if p is not None}:
            patch.double()  # as in PEFT: narrower factors would round the layer's input
        if isinstance(patch, InvokedPatch):
            if self.invocations is None:
                self.invocations = Invocations(self.model, self.acting, self.rows_of)
            patch.invocations = self.invocations
            patch.invocations.tokens[adapter.name] = tuple(adapter.config.invocation_tokens or ())
        site.add(patch)
        adapter.sites[site.path] = site

    def put(self, adapter: Attached, patches: Iterable[tuple[str, Patch]]) -> None:
        """Add an adapter with its patches; it does not act yet."""
        for path, patch in patches:
            self.add(adapter, path, patch)
        self.adapters[adapter.name] = adapter

    def remove(self, name: str) -> None:
        """Remove an adapter from all its modules; sites without patches are removed too."""
        adapter = self.adapters.pop(name)
        if adapter.watch is not None:
            adapter.watch.release()
        for path in list(adapter.sites):
            self.take(adapter, path)
        if self.invocations is not None:
            self.invocations.tokens.pop(name, None)
            self.invocations.missed.pop(name, None)
            if not self.invocations.tokens:
                self.invocations.release()
                self.invocations = None
        if not self.adapters:
            self.unreplicate()

    def take(self, adapter: Attached, path: str) -> None:
        """Remove an adapter from one module."""
        site = adapter.sites.pop(path)
        site.remove(adapter.name)
        if site.patches:
            site.select(self.active)
        else:
            site.leave()
            del self.sites[site.path]
            self.guard.hosts.reset()

    def select(self, active: Mapping[str, float]) -> None:
        """Activate these adapters; the trainable ones among them are trained."""
        before, self.active = self.active, dict(active)
        for name in {**before, **self.active}:
            adapter = self.adapters.get(name)
            if adapter is None:
                continue
            trained = adapter.trainable and name in self.active
            if name in self.active and adapter.watch is None:
                patches = adapter.patches()
                adapter.watch = FirstCallWatch(
                    self.model, self.modules, name, patches, strict=adapter.strict
                )
            if adapter.watch is not None:
                adapter.watch.acts = name in self.active
            if trained:
                self._unpacked += keep_unpacked(self.model)
            for site, patch in adapter.patches():
                site.select(self.active)
                patch.requires_grad_(trained)
        self.pad_encoders()
        self.guard.watch(on=bool(self.active))

    def pad_encoders(self) -> None:
        """Make torch's encoders keep rows padded if sites inside them act."""
        if self.encoders.modules:
            self.encoders.keep_padded([site.host for site in self.sites.values() if site.acts])

    def known(self, names: Collection[str]) -> None:
        """`Refused` for names without an adapter."""
        unknown = [name for name in names if name not in self.adapters]
        if unknown:
            raise Refused(
                f"no adapter {', '.join(map(shown, unknown))}",
                expected=", ".join(map(shown, self.adapters)) or "an adapter; there is none",
                where="the model's adapters",
                hint=did_you_mean(unknown, self.adapters) or "load or attach it first",
                code="AK802",
            )

    def provide(self, names: Collection[str], *, with_active: bool) -> None:
        """Load those of these names that a store has; `Refused` for names without an adapter."""
        if self.store is not None:
            self.store.provide(names, with_active=with_active)
        self.known(names)

    def outside_rows(self, where: str) -> None:
        """`Refused` inside a mixed batch, for calls that would change it."""
        if self.rows is not None:
            raise Refused(
                f"{where} inside rows",
                expected="adapters that do not change",
                where=where,
                hint="leave the rows first",
                code="AK802",
            )

    def own_weights(self, where: str, names: Collection[str] | None = None) -> None:
        """`Refused` while adapters (of `names`) are merged, because the caller needs the base
        itself."""
        merged = [name for name in self.merged if names is None or name in names]
        if merged:
            raise Refused(
                f"{listed(merged)} {'are' if len(merged) > 1 else 'is'} merged",
                expected="adapters that are not merged",
                where=where,
                hint="unmerge first",
                code="AK802",
            )

    def unused(self, name: str) -> None:
        """`Refused` for the name of an existing adapter."""
        errors = Problems(where="name", code="AK802")
        if not isinstance(name, str) or not name:
            errors.add(f"name {name!r}", "a text")
        elif name in self.adapters:
            errors.add(
                f"an adapter {shown(name)} is there already",
                "a new name",
                "give another name=, or delete it first",
            )
        errors.raise_all()

    def release(self) -> None:
        allow_packed(self._unpacked)
        for module, leaf, flag in self._flags:
            parameter = module._parameters.get(leaf)
            if parameter is not None:
                parameter.requires_grad_(flag)


class Encoders:
    """The encoders of a model, which keep rows padded while adapters inside them act."""

    def __init__(self, model: nn.Module):
        self.modules = [m for m in model.modules() if isinstance(m, nn.TransformerEncoder)]
        self.hooks: list[RemovableHandle] = []

    def keep_padded(self, acting: Collection[nn.Module]) -> None:
        """Keep rows padded in encoders that contain one of these modules; restore the others."""
        for hook in self.hooks:
            hook.remove()
        hosts = set(acting)
        self.hooks = [
            hook
            for encoder in self.modules
            if encoder.use_nested_tensor and not hosts.isdisjoint(encoder.modules())
            for hook in (
                encoder.register_forward_pre_hook(_begin),
                encoder.register_forward_hook(_end, with_kwargs=True, always_call=True),
            )
        ]


def _begin(encoder: Host, *_: object) -> None:
    encoder.use_nested_tensor = False


def _end(encoder: Host, args: Args, kwargs: Kwargs, y: Tensor | None) -> Tensor | None:
    """Zero the padding without gradients, as nested tensors would."""
    encoder.use_nested_tensor = True
    mask = args[2] if len(args) > 2 else kwargs.get("src_key_padding_mask")
    if y is None or mask is None or torch.is_grad_enabled():
        return None
    return y.masked_fill((mask if mask.dtype == torch.bool else mask < 0)[..., None], 0.0)

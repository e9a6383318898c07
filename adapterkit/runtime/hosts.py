"""Modules that are no longer what their sites were put on: replaced, resized, or fused."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from adapterkit.errors import AdapterkitError, Refused, listed
from adapterkit.runtime.site import Site, sizes_of

# what diffusers' fuse_qkv_projections runs one layer in place of
FUSED = {"to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"}


class Hosts:
    """The modules of a model's sites, looked at before each forward: what was remembered when all
    was well is compared, which takes microseconds."""

    def __init__(self, model: nn.Module, sites: Mapping[str, Site]):
        self.model, self.sites = model, sites
        self.forget()

    def forget(self) -> None:
        """Look at the model anew."""
        self._links: list[tuple[dict, str, nn.Module]] = []  # children, name, which it is
        self._sizes: list[tuple[dict, str, int]] = []  # attributes, name, value
        self._fusable: list[Site] = []
        self._known = False

    def problems(self, sites: Iterable[Site], where: str) -> list[AdapterkitError]:
        """Refusals of sites whose module is no part of the model, has another size, or is not
        run."""
        if self._known and self._as_before():
            return []
        reasons: dict[str, list[str]] = {}
        for site, reason in self._lost(sites):
            reasons.setdefault(reason, []).append(site.path)
        return [
            Refused(
                f"{listed(paths)}: {reason}",
                expected="the modules that the adapters were put on",
                where=where,
                hint="change the model first, then attach or load; detach gives it back as it is",
            )
            for reason, paths in reasons.items()
        ]

    def _as_before(self) -> bool:
        return (
            all(children.get(name) is module for children, name, module in self._links)
            and all(own.get(name) == size for own, name, size in self._sizes)
            and not any(map(self._is_fused, self._fusable))
        )

    def _lost(self, sites: Iterable[Site]) -> Iterator[tuple[Site, str]]:
        modules = set(self.model.modules())  # also those that wrappers hold
        reasons = {site: self._reason(site, modules) for site in self.sites.values()}
        self.forget()
        if not any(reasons.values()):
            self._remember()
        for site in sites:
            if reason := reasons[site]:
                yield site, reason

    def _reason(self, site: Site, modules: Collection[nn.Module]) -> str | None:
        if site.host not in modules:
            return "replaced since"
        if sizes_of(site.host) != site.sizes:
            sizes = ", ".join(f"{name} {size}" for name, size in site.sizes.items())
            return f"resized since, before {sizes}"
        return "fused with others since, and not run" if self._is_fused(site) else None

    def _remember(self) -> None:
        self._known, seen = True, set()
        for path, site in self.sites.items():
            module: nn.Module | None = self.model
            parts = path.split(".") if path else []
            for i, name in enumerate(parts):
                children, module = module._modules, module._modules.get(name)
                if module is None:  # inside a wrapper, which is where it was
                    break
                if (prefix := tuple(parts[: i + 1])) not in seen:
                    seen.add(prefix)
                    self._links.append((children, name, module))
            self._sizes += [(vars(site.host), *each) for each in site.sizes.items()]
            if path.rpartition(".")[2] in FUSED:
                self._fusable.append(site)

    def _is_fused(self, site: Site) -> bool:
        """Whether diffusers runs a fused layer: new attentions have a flag, in older ones, whose
        flag stays, the processor tells."""
        if site.path.rpartition(".")[2] not in FUSED:
            return False
        try:
            parent: Any = self.model.get_submodule(site.path.rpartition(".")[0])
        except AttributeError:  # inside a wrapper
            return False
        fuses = hasattr(parent, "unfuse_projections")
        fuses = fuses or "Fused" in type(getattr(parent, "processor", None)).__name__
        return fuses and bool(getattr(parent, "fused_projections", False))

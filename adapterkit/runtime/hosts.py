"""Modules that are no longer what their sites were put on: replaced, resized, or fused."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from adapterkit.errors import AdapterkitError, Refused, listed
from adapterkit.runtime.site import Site

# what diffusers' fuse_qkv_projections runs one layer in place of
FUSED = {"to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"}


class Hosts:
    """The model's modules on the way to each site, as they were when they were looked at last."""

    def __init__(self, model: nn.Module, sites: Mapping[str, Site]):
        self.model, self.sites = model, sites
        self.forget()

    def forget(self) -> None:
        """Look at the model anew."""
        self._links: list[tuple[dict, str, nn.Module]] | None = None

    def problems(self, sites: Iterable[Site], where: str) -> list[AdapterkitError]:
        """Refusals of sites whose module is no part of the model, has another size, or is not
        run."""
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

    def _lost(self, sites: Iterable[Site]) -> Iterator[tuple[Site, str]]:
        left = None if self._unchanged() else set(self.model.modules())
        for site in sites:
            if left is not None and site.host not in left:
                yield site, "replaced since"
            elif site.resized():
                yield site, f"resized since, before {_text(site.sizes)}"
            elif site.path.rpartition(".")[2] in FUSED and self._is_fused(site):
                yield site, "fused with others since, and not run"
        if left is not None:
            self.forget()

    def _unchanged(self) -> bool:
        """Whether each module is where it was; wrappers around it change that."""
        if self._links is None:
            self._links = list(self._walk())
            hosts = {module for *_, module in self._links}
            return all(site.host in hosts for site in self.sites.values())
        return all(children.get(name) is module for children, name, module in self._links)

    def _walk(self) -> Iterator[tuple[dict, str, nn.Module]]:
        seen: set[str] = set()
        for path in self.sites:
            module, parts = self.model, path.split(".") if path else []
            for i, name in enumerate(parts):
                child = module._modules.get(name)
                if child is None:
                    break
                prefix = ".".join(parts[: i + 1])
                if prefix not in seen:
                    seen.add(prefix)
                    yield module._modules, name, child
                module = child

    def _is_fused(self, site: Site) -> bool:
        """Whether diffusers runs a fused layer: new attentions have a flag, in older ones, whose
        flag stays, the processor tells."""
        try:
            parent: Any = self.model.get_submodule(site.path.rpartition(".")[0])
        except AttributeError:  # inside a wrapper
            return False
        fuses = hasattr(parent, "unfuse_projections")
        fuses = fuses or "Fused" in type(getattr(parent, "processor", None)).__name__
        return fuses and bool(getattr(parent, "fused_projections", False))


def _text(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {size}" for name, size in sizes.items())

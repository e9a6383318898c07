"""What others do with a model that has adapters: libraries that save or restore its state dict, in
which the adapters are not, and code that changes its modules. Refused, or the adapters were lost
without a word."""

import re
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from adapterkit.core.errors import AdapterkitError, Problems, Refused, by_reason, listed
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
        """Look at the model again."""
        self._links: list[tuple[dict, str, nn.Module]] = []  # children, name, which it is
        self._sizes: list[tuple[dict, str, int]] = []  # attributes, name, value
        self._fusable: list[Site] = []
        self._known = False

    def problems(self, sites: Iterable[Site], where: str) -> Sequence[AdapterkitError]:
        """Refusals of sites whose module is no part of the model, has another size, or is not
        run."""
        if self._known and self._as_before():
            return []
        hint = "change the model first, then attach or load; detach gives it back as it is"
        errors = Problems(where=where, hint=hint, code="AK805")
        for reason, paths in by_reason(self._lost(sites)).items():
            errors.add(f"{listed(paths)}: {reason}", "the modules that the adapters were put on")
        return errors

    def _as_before(self) -> bool:
        return (
            all(children.get(name) is module for children, name, module in self._links)
            and all(own.get(name) == size for own, name, size in self._sizes)
            and not any(map(self._is_fused, self._fusable))
        )

    def _lost(self, sites: Iterable[Site]) -> list[tuple[str, str | None]]:
        modules = set(self.model.modules())  # also those that wrappers hold
        reasons = {site: self._reason(site, modules) for site in self.sites.values()}
        self.forget()
        if not any(reasons.values()):
            self._remember()
        return [(site.path, reasons[site]) for site in sites]

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


LIBRARIES = {
    "transformers", "diffusers", "accelerate", "deepspeed",
    "lightning", "pytorch_lightning", "lightning_fabric",
}  # fmt: skip
SAVES = re.compile(r"save|get_state_dict|dump_checkpoint")  # in the names of their functions
LOADS = re.compile(r"_load_from_checkpoint|_load_best_model|load_state$|restore_model")
OWNER = "_adapterkit_models"  # of a Trainer or Accelerator that saves the adapters of these models


class Guard:
    """Hooks on a model while adapters act.

    Who asks for the state dict is read from the stack: a library's save gets it by the same call
    as anything that only looks at the base."""

    def __init__(
        self, model: nn.Module, sites: Mapping[str, Site], acting: Callable[[], Collection[str]]
    ):
        self.model, self.acting = model, acting
        self.hosts = Hosts(model, sites)
        self._sites = sites
        self._hooks: list[RemovableHandle] = []

    def watch(self, *, on: bool) -> None:
        """Watch the model, or no longer: torch's fused layers run in modules without hooks only."""
        if on and not self._hooks:
            model = self.model
            self._hooks = [
                model.register_forward_pre_hook(self._before_forward),
                model.register_state_dict_pre_hook(self._before_save),
                model.register_load_state_dict_pre_hook(self._before_load),
            ]
        elif not on:
            for hook in self._hooks:
                hook.remove()
            self._hooks = []

    def _before_forward(self, module: nn.Module, args: object) -> None:
        if torch.compiler.is_compiling():
            return
        Problems(self.hosts.problems(self._sites.values(), "the model")).raise_all()
        if module.training and torch.is_grad_enabled():
            self._before_step()

    def _before_step(self) -> None:
        """Refuse a Trainer that will save the base alone, before the first step."""
        for library, name, owner in _callers():
            if name != "training_step" or library != "transformers" or self._saves(owner):
                continue
            kind = type(owner).__name__
            args = getattr(owner, "args", None)
            if getattr(args, "save_strategy", "steps") == "no":
                text = f"{kind} saves the base alone: adapters.trainer({kind}) saves the adapters"
                warnings.warn(text, stacklevel=2)
                return
            raise self._refused(f"{kind} saves checkpoints", "adapters")

    def _before_save(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        self._refuse_others(SAVES, "saves")

    def _before_load(self, module: nn.Module, *args: object) -> None:
        self._refuse_others(LOADS, "restores")

    def _refuse_others(self, names: re.Pattern[str], verb: str) -> None:
        callers = [each for each in _callers() if names.search(each[1])]
        if callers and self.acting() and not any(self._saves(owner) for *_, owner in callers):
            library, name, _ = callers[-1]
            raise self._refused(f"{library}: {name} {verb} the base", name)

    def _refused(self, problem: str, where: str) -> Refused:
        return Refused(
            f"{problem} without {listed(list(self.acting()))}",
            expected="a save of what acts",
            where=where,
            hint="adapters.trainer(Trainer), adapters.accelerate(accelerator) or adapters.save; "
            "the base alone inside `with adapters.disabled()`, both in one after merge",
            code="AK805",
        )

    def _saves(self, owner: object) -> bool:
        """Whether a Trainer or Accelerator saves and restores this model's adapters."""
        return any(model is self.model for model in getattr(owner, OWNER, ()))


def _callers() -> Iterator[tuple[str, str, object]]:
    """The functions of libraries on the stack, innermost first: library, name, and whose method."""
    frame = sys._getframe(1)
    while frame is not None:
        library = str(frame.f_globals.get("__name__")).partition(".")[0]
        if library in LIBRARIES:
            yield library, frame.f_code.co_name, frame.f_locals.get("self")
        frame = frame.f_back

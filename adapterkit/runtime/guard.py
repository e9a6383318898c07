"""Guards against silent failures: libraries that save or restore a model's state dict without the
adapters, code that changes modules with adapters, and adapters that do nothing.

Problems that a class's code shows are refused earlier (`core/weights/layers.py`); these checks find
problems that only a run shows."""

import re
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from adapterkit.core.errors import AdapterkitError, Problems, Refused, by_reason, listed, shown
from adapterkit.runtime.site import Patch, Site, sizes_of

# layers that diffusers' fuse_qkv_projections replaces by one
FUSED = {"to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"}


class Hosts:
    """The modules of a model's sites, compared before each forward with their state at the last
    success, which takes microseconds."""

    def __init__(self, model: nn.Module, sites: Mapping[str, Site]):
        self.model, self.sites = model, sites
        self.reset()

    def reset(self) -> None:
        """Compare with the model again from scratch."""
        self._links: list[tuple[dict, str, nn.Module]] = []  # children, name, which it is
        self._sizes: list[tuple[dict, str, int]] = []  # attributes, name, value
        self._fusable: list[Site] = []
        self._known = False

    def problems(self, sites: Iterable[Site], where: str) -> Sequence[AdapterkitError]:
        """Refusals of sites whose module was replaced or resized, or is not run."""
        if self._known and self._as_before():
            return []
        hint = "change the model first, then attach or load; detach removes the adapters"
        errors = Problems(where=where, hint=hint, code="AK805")
        for reason, paths in by_reason(self._lost(sites)).items():
            errors.add(
                f"{listed(paths)}: {reason}", "the modules that the adapters were attached to"
            )
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
        self.reset()
        if not any(reasons.values()):
            self._remember()
        return [(site.path, reasons[site]) for site in sites]

    def _reason(self, site: Site, modules: Collection[nn.Module]) -> str | None:
        if site.host not in modules:
            return "replaced since"
        if sizes_of(site.host) != site.sizes:
            sizes = ", ".join(f"{name} {size}" for name, size in site.sizes.items())
            return f"resized since, before {sizes}"
        return "fused with other layers since, and not run" if self._is_fused(site) else None

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
        """Return whether diffusers runs a fused layer: new attentions have a flag; for older ones,
        whose flag stays set, the processor's class shows it."""
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
OWNER = "_adapterkit_models"  # set on a Trainer or Accelerator that saves these models' adapters


class Guard:
    """Hooks on a model while adapters act.

    The stack shows which library requests the state dict, because a save and a mere read of the
    base make the same call."""

    def __init__(
        self, model: nn.Module, sites: Mapping[str, Site], acting: Callable[[], Collection[str]]
    ):
        self.model, self.acting = model, acting
        self.hosts = Hosts(model, sites)
        self._sites = sites
        self._hooks: list[RemovableHandle] = []

    def watch(self, *, on: bool) -> None:
        """Watch the model, or stop, because torch's fused layers run only in modules without
        hooks."""
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
        """Refuse a Trainer that will save only the base, before the first step."""
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
            expected="a save of the active adapters",
            where=where,
            hint="adapters.trainer(Trainer), adapters.accelerate(accelerator) or adapters.save; "
            "save the base alone inside `with adapters.disabled()`, or both in one after merge",
            code="AK805",
        )

    def _saves(self, owner: object) -> bool:
        """Return whether a Trainer or Accelerator saves and restores this model's adapters."""
        return any(model is self.model for model in getattr(owner, OWNER, ()))


def _callers() -> Iterator[tuple[str, str, object]]:
    """Library functions on the stack, innermost first: library, name, and a method's `self`."""
    frame = sys._getframe(1)
    while frame is not None:
        library = str(frame.f_globals.get("__name__")).partition(".")[0]
        if library in LIBRARIES:
            yield library, frame.f_code.co_name, frame.f_locals.get("self")
        frame = frame.f_back


GIVEN = ("inputs_embeds", "decoder_inputs_embeds", "encoder_outputs")  # in a module's place
STEPS = 8  # optimizer steps that wait for gradients


class FirstCallWatch:
    """Checks of one adapter in the model's first call, and at the first optimizer step."""

    def __init__(
        self,
        model: nn.Module,
        modules: Mapping[str, nn.Module],
        name: str,
        patches: Iterable[tuple[Site, Patch]],
        *,
        strict: bool,
    ):
        self.name, self.patches, self.strict, self.steps = name, list(patches), strict, STEPS
        self.acts = True  # whether the adapter acts now
        self.looks = False  # whether it acted when the call began, for all modules
        self.around: set[int] = set()  # modules around their hosts
        self._parents = {
            site: parent
            for site, patch in self.patches
            if patch.called and (parent := modules.get(site.path.rpartition(".")[0])) is not None
        }
        self._inner: list[RemovableHandle] = []
        self._hooks = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after),
        ]

    def release(self) -> None:
        """Stop watching."""
        self._end_call()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        _waiting.discard(self)

    def _before(self, model: nn.Module, args: object, kwargs: dict[str, object]) -> None:
        if torch.compiler.is_compiling():
            return
        self._end_call()  # of one that failed
        self.looks = self.acts and all(kwargs.get(name) is None for name in GIVEN)
        if not self.looks:
            return
        for site, _ in self.patches:
            site.watched = True
        self._inner = [
            parent.register_forward_pre_hook(self._enter) for parent in {*self._parents.values()}
        ]

    def _enter(self, module: nn.Module, args: object) -> None:
        self.around.add(id(module))

    def _after(self, model: nn.Module, args: object, output: object) -> None:
        if torch.compiler.is_compiling() or not self.looks:
            return
        self.around.add(id(model))
        self.release()
        if any(p.requires_grad for _, patch in self.patches for _, p in patch.trained()):
            _waiting.add(self)
            if not _hook:
                _hook.append(register_optimizer_step_pre_hook(_on_step))
        self._say(
            "not called in the model's first call, though the module around it was", self._idle()
        )

    def _idle(self) -> Iterator[str]:
        """Paths of modules that were not called. Modules whose parent was not called either, such
        as an expert's, are left out, and so are values shared with a module that was called."""
        acting = {id(p) for site, patch in self.patches if site.called for p in patch.parameters()}
        for site, patch in self.patches:
            own = {*map(id, patch.parameters())}
            around = id(self._parents.get(site)) in self.around
            if around and own and not site.called and not own & acting:
                yield site.path

    def _end_call(self) -> None:
        for site, _ in self.patches:
            site.watched = False
        for hook in self._inner:
            hook.remove()
        self._inner = []

    def step(self, owned: Set[int]) -> None:
        """Check the gradients of an optimizer's parameters, by id."""
        trained = [
            (site.path, [p for _, p in patch.trained() if p.requires_grad])
            for site, patch in self.patches
            if site.called
        ]
        trained = [(path, own) for path, own in trained if own and {*map(id, own)} <= owned]
        self.steps -= 1
        # an optimizer that computes the gradients itself has none yet
        if any(p.grad is not None for _, own in trained for p in own) or not self.steps:
            _waiting.discard(self)
            self._say(
                "without a gradient at the first step",
                [path for path, own in trained if all(p.grad is None for p in own)],
            )

    def _say(self, problem: str, paths: Iterable[str]) -> None:
        paths = list(dict.fromkeys(paths))
        if not paths:
            return
        error = Refused(
            f"{problem}: {listed(paths)}",
            expected="values that act",
            where=f"adapter {shown(self.name)}",
            hint="remove these modules from the config, unless other calls use them",
            code="AK801",
        )
        if self.strict:
            raise error
        warnings.warn(str(error), stacklevel=2)


_waiting: WeakSet[FirstCallWatch] = WeakSet()
_hook: list[RemovableHandle] = []  # the one of all optimizers


def _on_step(optimizer: Any, args: object, kwargs: object) -> None:
    if _waiting and not torch.compiler.is_compiling():
        owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for watch in list(_waiting):
            watch.step(owned)

"""What others do with a model that has adapters: libraries that save or restore its state dict, in
which the adapters are not, and code that changes its modules. Refused, or the adapters were lost
without a word."""

import re
import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from adapterkit.errors import Problems, Refused, listed
from adapterkit.runtime.hosts import Hosts
from adapterkit.runtime.site import Site

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
        self,
        model: nn.Module,
        sites: Mapping[str, Site],
        acting: Callable[[], Collection[str]],
    ):
        self.model, self.acting = model, acting
        self.hosts = Hosts(model, sites)
        self._sites = sites
        self._hooks: list[Any] = []

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

    def _before_forward(self, module: nn.Module, args: Any) -> None:
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

    def _before_load(self, module: nn.Module, *args: Any) -> None:
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

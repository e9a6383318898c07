"""Finds values that do nothing: modules that the code around them does not call, at the first call
of a model, and values without a gradient, at the first step of an optimizer.

What the code of a class shows is refused before (`core/weights/unsupported_layers.py`); here is
what only runs show."""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Set
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from adapterkit.core.errors import Refused, listed, shown
from adapterkit.runtime.site import Part, Site

GIVEN = ("inputs_embeds", "decoder_inputs_embeds", "encoder_outputs")  # in a module's place
STEPS = 8  # of optimizers, after which gradients are not waited for any longer


class FirstCallWatch:
    """What is seen of one adapter in the first call of the model, and in the first step."""

    def __init__(
        self,
        model: nn.Module,
        modules: Mapping[str, nn.Module],
        name: str,
        parts: Iterable[tuple[Site, Part]],
        *,
        strict: bool,
    ):
        self.name, self.parts, self.strict, self.steps = name, list(parts), strict, STEPS
        self.acts = True  # whether the adapter does now
        self.looks = False  # whether it did when the call began, in which all modules had a part
        self.around: set[int] = set()  # modules around their hosts
        self._parents = {
            site: parent
            for site, part in self.parts
            if part.called and (parent := modules.get(site.path.rpartition(".")[0])) is not None
        }
        self._inner: list[RemovableHandle] = []
        self._hooks = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after),
        ]

    def release(self) -> None:
        """Look no longer."""
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
        for site, _ in self.parts:
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
        if any(p.requires_grad for _, part in self.parts for _, p in part.trained()):
            _wait(self)
        self._say(
            "not called in the model's first call, though the module around it was", self._idle()
        )

    def _idle(self) -> Iterator[str]:
        """Paths of modules that were not called. Where the one around was not either, such as an
        expert, this says nothing; values shared with a module that was called act there."""
        acting = {id(p) for site, part in self.parts if site.called for p in part.parameters()}
        for site, part in self.parts:
            own = {*map(id, part.parameters())}
            around = id(self._parents.get(site)) in self.around
            if around and own and not site.called and not own & acting:
                yield site.path

    def _end_call(self) -> None:
        for site, _ in self.parts:
            site.watched = False
        for hook in self._inner:
            hook.remove()
        self._inner = []

    def step(self, owned: Set[int]) -> None:
        """Look at the gradients of what an optimizer has, by id."""
        trained = [
            (site.path, [p for _, p in part.trained() if p.requires_grad])
            for site, part in self.parts
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


def _wait(watch: FirstCallWatch) -> None:
    _waiting.add(watch)
    if not _hook:
        _hook.append(register_optimizer_step_pre_hook(_on_step))


def _on_step(optimizer: Any, args: object, kwargs: object) -> None:
    if _waiting and not torch.compiler.is_compiling():
        owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for watch in list(_waiting):
            watch.step(owned)

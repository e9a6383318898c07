"""Gather the gradients of a live model's weights layer by layer."""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from adapterkit.core.errors import Failed, shown


class Gradients:
    """Means of dLoss/dW over backward passes, summed in float32 on the CPU. Each gradient is added
    as soon as it is computed, and freed.

    `per_call`: the mean over the calls of each module, as in PEFT's LoRA-GA. Without it, the mean
    over the passes: their number is that of the weight with most gradients, and a module that a
    pass leaves out counts as zero."""

    def __init__(self, model: nn.Module, paths: Mapping[str, bool], per_call: bool = False):
        self.model, self.paths, self.per_call = model, paths, per_call
        self.totals: dict[nn.Parameter, Tensor] = {}
        self.passes, self.calls = Counter[nn.Parameter](), Counter[str]()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Give gradients only to the modules' weights inside the context, and restore everything
        afterwards."""
        parameters = list(self.model.parameters())
        before = [(parameter.requires_grad, parameter.grad) for parameter in parameters]
        hooks: list[Any] = []
        try:
            for parameter in parameters:
                parameter.requires_grad_(False)
                parameter.grad = None
            for weight in dict.fromkeys(map(self._weight, self.paths)):
                weight.requires_grad_(True)
                hooks.append(weight.register_post_accumulate_grad_hook(self._take))
            if self.per_call:
                for path in self.paths:
                    module = self.model.get_submodule(path)
                    hooks.append(module.register_forward_hook(self._counter(path)))
            with torch.enable_grad():
                yield
        finally:
            for hook in hooks:
                hook.remove()
            for parameter, (flag, grad) in zip(parameters, before, strict=True):
                parameter.requires_grad_(flag)
                parameter.grad = grad

    def _weight(self, path: str) -> nn.Parameter:
        return self.model.get_submodule(path).get_parameter("weight")

    @torch.no_grad()
    def _take(self, weight: nn.Parameter) -> None:
        assert weight.grad is not None
        grad = weight.grad.float().cpu()
        weight.grad = None
        self.passes[weight] += 1
        total = self.totals.get(weight)
        if total is None:
            self.totals[weight] = grad
        else:
            total += grad

    def _counter(self, path: str) -> Any:
        """A hook that counts the calls of a module whose outputs get gradients."""

        def count(gradient: Tensor) -> None:
            self.calls[path] += 1

        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(count)

        return hook

    def taken(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (module, sum as the model has the weight) since the last call."""
        totals, self.totals = self.totals, {}
        for path in self.paths:
            if (weight := self._weight(path)) in totals:
                yield path, totals[weight]

    def means(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (module, (out, in) float32) for modules with gradients, each in its own memory;
        `Failed` for one that is not finite."""
        passes = max(self.passes.values(), default=0)
        for path, transposed in self.paths.items():
            weight = self._weight(path)
            if weight not in self.totals:
                continue
            mean = self.totals[weight] / (self.calls[path] if self.per_call else passes)
            if not bool(mean.isfinite().all()):
                raise Failed(
                    f"gradients of {shown(path)} are not finite",
                    expected="numbers",
                    where="collect",
                    hint="run the model in float32 or bfloat16",
                    code="AK903",
                )
            yield path, mean.T.contiguous() if transposed else mean

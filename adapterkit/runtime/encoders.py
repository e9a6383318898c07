"""torch's TransformerEncoder in eval mode: it makes nested tensors of padded rows unless its own
parameters get gradients, and fails where those of adapters do."""

from collections.abc import Collection
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


class Encoders:
    """The encoders of a model, which keep rows padded while adapters in them get gradients."""

    def __init__(self, model: nn.Module):
        self.modules = [m for m in model.modules() if isinstance(m, nn.TransformerEncoder)]
        self.hooks: list[RemovableHandle] = []

    def keep_padded(self, trained: Collection[nn.Module]) -> None:
        """Do so where one of these modules is inside; the others are as they were."""
        for hook in self.hooks:
            hook.remove()
        hosts = set(trained)
        self.hooks = [
            hook
            for encoder in self.modules
            if encoder.use_nested_tensor and not hosts.isdisjoint(encoder.modules())
            for hook in (
                encoder.register_forward_pre_hook(partial(_set, without_autograd=True)),
                encoder.register_forward_hook(_set, always_call=True),
            )
        ]


def _set(encoder: Any, *_: Any, without_autograd: bool = False) -> None:
    encoder.use_nested_tensor = not (without_autograd and torch.is_grad_enabled())

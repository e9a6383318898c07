"""torch's TransformerEncoder in eval mode: it makes nested tensors of padded rows, which adapters
do not take."""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class Encoders:
    """The encoders of a model, which keep rows padded while adapters in them act."""

    def __init__(self, model: nn.Module):
        self.modules = [m for m in model.modules() if isinstance(m, nn.TransformerEncoder)]
        self.hooks: list[RemovableHandle] = []

    def keep_padded(self, acting: Collection[nn.Module]) -> None:
        """Do so where one of these modules is inside; the others are as they were."""
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


def _begin(encoder: Any, *_: Any) -> None:
    encoder.use_nested_tensor = False


def _end(encoder: Any, args: Any, kwargs: Any, y: Tensor | None) -> Tensor | None:
    """Without gradients the padding gets zeros, as from nested tensors."""
    encoder.use_nested_tensor = True
    mask = args[2] if len(args) > 2 else kwargs.get("src_key_padding_mask")
    if y is None or mask is None or torch.is_grad_enabled():
        return None
    return y.masked_fill((mask if mask.dtype == torch.bool else mask < 0)[..., None], 0.0)

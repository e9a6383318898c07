"""The predictions that a model makes of the tokens of its inputs, and the labels that they are
compared with."""

import inspect
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from adapterkit.verbs.stats.data.records import IGNORED

KEEP = "logits_to_keep"  # positions whose logits transformers' causal models compute


class WithoutLoss(TorchFunctionMode):
    """Replace cross entropy by zero in a model that makes its decoder's inputs of labels: it needs
    no loss, and the head may predict more rows than there are labels."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0].new_zeros(()) if func is F.cross_entropy else func(*args, **(kwargs or {}))


@dataclass
class Predictions:
    """Run a model on samples without its own loss.

    Labels are the next tokens for a causal model, else tokens at the same position; one for each
    whole input, such as an image."""

    model: Any

    @property
    def has_decoder(self) -> bool:
        """True if the model makes its decoder's inputs of the labels."""
        return bool(getattr(self.model.config, "is_encoder_decoder", False))

    @property
    def is_causal(self) -> bool:
        others = ("ForMaskedLM", "Classification")  # labels at the same position, or one per input
        own = any(word in type(self.model).__name__ for word in others)
        return not self.has_decoder and not own

    @cached_property
    def _keeps(self) -> bool:
        return self.is_causal and KEEP in inspect.signature(self.model.forward).parameters

    def logits(self, inputs: Mapping[str, Tensor], **more: Any) -> Tensor:
        """(rows, tokens, vocabulary), at least float32."""
        given = inputs.items()
        own = {key: value for key, value in given if key != "labels" or self.has_decoder}
        with WithoutLoss() if self.has_decoder else nullcontext():
            logits = self.model(**own, **more).logits
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def targets(self, labels: Tensor) -> Tensor:
        """The token to predict at each position (rows, tokens); a causal model's last position has
        none. Labels are shifted, because a slice of the logits would copy them."""
        return F.pad(labels[:, 1:], (0, 1), value=IGNORED) if self.is_causal else labels

    def counted(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits (rows, n, vocabulary) of one sample, at its positions whose next token counts, and
        these tokens (n,). Rows are several if the head predicts for others too."""
        targets = self.targets(inputs["labels"])[0]
        (at,) = (targets != IGNORED).nonzero(as_tuple=True)
        if self._keeps:
            return self.logits(inputs, **{KEEP: at}), targets[at]
        return self.logits(inputs)[:, at], targets[at]

"""Which tokens of a model's inputs count: neither padding nor labels that are ignored."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from adapterkit.errors import Failed, shown

IGNORED = -100  # of labels, as in torch's cross entropy
DECODER_INPUTS = ("decoder_input_ids", "decoder_inputs_embeds")
# of the arguments of a model's forward: (batch, length) of its tokens, None for all; of an
# encoder-decoder a pair, the encoder's and the decoder's
Rule = Callable[[Mapping[str, Any]], Tensor | tuple | None]


def token_masks(inputs: Mapping[str, Any]) -> tuple[Tensor | None, Tensor | None]:
    """The masks (batch, length) of an encoder's tokens and of a decoder's, by the arguments of the
    model's forward: attention_mask, and labels other than -100 (EVA's rule, arXiv:2410.07170).

    A decoder-only model, or an encoder alone, has the first. Labels are the decoder's where there
    is one, and count where they are as long as the tokens.
    """
    two = any(inputs.get(key) is not None for key in DECODER_INPUTS)
    labels = inputs.get("labels")
    own = _mask(inputs, "", None if two else labels)
    return own, _mask(inputs, "decoder_", labels) if two else None


def _mask(inputs: Mapping[str, Any], prefix: str, labels: Any) -> Tensor | None:
    mask = inputs.get(f"{prefix}attention_mask")
    if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
        what = f"of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise Failed(
            f"{prefix}attention_mask {what}",
            expected="one of (batch, length): which tokens are no padding",
            where="collect",
            hint="say which tokens count with mask=",
        )
    shape = _token_shape(inputs, prefix)
    if mask is not None:
        mask = mask.bool()
        if shape is not None and mask.shape[1] > shape[1]:  # of a cache, too
            mask = mask[:, -shape[1] :]
    if isinstance(labels, Tensor) and labels.shape == shape and not labels.is_floating_point():
        counted = labels != IGNORED
        mask = counted if mask is None else mask.to(counted.device) & counted
    return mask


def _token_shape(inputs: Mapping[str, Any], prefix: str) -> torch.Size | None:
    """(batch, length) of the tokens."""
    ids, embeds = inputs.get(f"{prefix}input_ids"), inputs.get(f"{prefix}inputs_embeds")
    if isinstance(ids, Tensor):
        return ids.shape
    return embeds.shape[:2] if isinstance(embeds, Tensor) else None


class Masks:
    """The masks of the inputs of a model's layers, while the model runs.

    `rule`: what counts, `token_masks` if it is None. Layers that are called outside of the model's
    own forward have none.
    """

    def __init__(self, model: nn.Module, rule: Rule | None = None):
        self.model, self.rule = model, rule or token_masks
        self._forget()

    def _forget(self) -> None:
        self.first = self.second = None
        self.has_two = self.in_encoder = False
        self.encoded: Tensor | None = None
        self.flat: dict[int, Tensor] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Follow the model's calls."""
        hooks = [
            self.model.register_forward_pre_hook(self.enter, with_kwargs=True),
            self.model.register_forward_hook(lambda *_: self._forget(), always_call=True),
        ]
        encoder = encoder_of(self.model)
        if encoder is not None:
            hooks += [
                encoder.register_forward_pre_hook(self.enter_encoder),
                encoder.register_forward_hook(self.leave_encoder),
            ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """The model is called."""
        self._forget()
        inputs = _arguments(module, args, kwargs)
        if encoder_of(module) is not None:
            self.has_two = True
            outputs, labels = inputs.get("encoder_outputs"), inputs.get("labels")
            self.encoded = None if outputs is None else outputs[0]
            if not any(inputs.get(key) is not None for key in DECODER_INPUTS):
                inputs["decoder_input_ids"] = labels  # as long as what the model makes of them
        masks = self.rule(inputs)
        first, second = masks if isinstance(masks, tuple) else (masks, None)
        self.first, self.second = _partial(first), _partial(second)

    def enter_encoder(self, *_: Any) -> None:
        """The model's encoder is called."""
        self.in_encoder = True

    def leave_encoder(self, module: nn.Module, args: tuple, output: Any) -> None:
        """The model's encoder returns."""
        self.in_encoder = False
        self.encoded = output if isinstance(output, Tensor) else output[0]

    def of(self, path: str, x: Tensor) -> Tensor | None:
        """The mask of a layer's input x (..., in), None where all of it counts; `Failed` where it
        does not fit."""
        mask = self.first
        if self.has_two and not self.in_encoder and not _is_same(x, self.encoded):
            mask = self.second
        shape = x.shape[:-1]
        if mask is None or shape == mask.shape:
            return mask
        if shape == mask.shape[:1]:  # a vector for each text
            return None
        if shape.numel() == mask.numel():
            return self.flat.setdefault(id(mask), mask.reshape(shape))
        raise Failed(
            f"{shown(path)} saw an input of {tuple(x.shape)}, and the mask is {tuple(mask.shape)}",
            expected="a mask of the tokens that the layer sees",
            where="collect",
            hint="give texts of one length, or mask=, or leave the layer out of targets",
        )


def _arguments(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a module's forward by name."""
    signature = inspect.signature(module.forward)
    inputs = dict(signature.bind_partial(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            inputs |= inputs.pop(name, {})
    return inputs


def _partial(mask: Tensor | None) -> Tensor | None:
    """A mask that leaves something out, as flags."""
    return None if mask is None or bool(mask.all()) else mask.bool()


def encoder_of(model: nn.Module) -> nn.Module | None:
    """The encoder of a transformers model that has a decoder as well."""
    config = getattr(model, "config", None)
    if not getattr(config, "is_encoder_decoder", False):
        return None
    encoder: Any = getattr(model, "get_encoder", lambda: None)()
    return encoder if isinstance(encoder, nn.Module) else None


def _is_same(x: Tensor, other: Tensor | None) -> bool:
    return other is not None and x.data_ptr() == other.data_ptr() and x.shape == other.shape

"""Find the tokens of a model's inputs that count: neither padding nor ignored labels."""

import inspect
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from adapterkit.core.errors import Failed, shown
from adapterkit.core.records import Json
from adapterkit.verbs.stats.data.records import IGNORED
from adapterkit.verbs.stats.data.tokens import BOTH, COUNTED, LEFT_OUT, TokenTracker

DECODER_INPUTS = ("decoder_input_ids", "decoder_inputs_embeds")
# of the arguments of a model's forward: (batch, length) of its tokens, None for all; of an
# encoder-decoder a pair, the encoder's and the decoder's
Rule = Callable[[Mapping[str, Any]], Tensor | tuple[Any, ...] | None]


def token_masks(inputs: Mapping[str, Any]) -> tuple[Tensor | None, Tensor | None]:
    """The masks (batch, length) of an encoder's tokens and of a decoder's, from the arguments of
    the model's forward: attention_mask, and labels other than -100 (EVA's rule, arXiv:2410.07170).

    A decoder-only model, or an encoder alone, has the first. Labels are the decoder's if there is
    one, and count if they are as long as the tokens."""
    two = any(inputs.get(key) is not None for key in DECODER_INPUTS)
    labels = inputs.get("labels")
    own = _mask(inputs, "", None if two else labels)
    return own, _mask(inputs, "decoder_", labels) if two else None


def _mask(inputs: Mapping[str, Any], prefix: str, labels: object) -> Tensor | None:
    mask = inputs.get(f"{prefix}attention_mask")
    if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
        what = f"of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise Failed(
            f"{prefix}attention_mask {what}",
            expected="one of (batch, length): true for tokens that are no padding",
            where="collect",
            hint="give the tokens that count as mask=",
            code="AK903",
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


class Leader:
    """The first of several calls of a model with inputs of the same shapes, with all tokens
    counting: the others pad and leave out the same vectors."""

    def __init__(self, tokens: TokenTracker):
        self.tokens, self.leaves_out, self.is_done = tokens, False, False

    @property
    def may_leave_out(self) -> bool:
        """True if some vectors may not count, as far as known so far."""
        return self.leaves_out or (self.tokens.has_padded and not self.is_done)


class Masks:
    """Masks of the input vectors that count, for a model's layers, while the model runs.

    `rule`: the tokens that count, `token_masks` if None. Tokens are followed from the model's
    inputs through its operations (`TokenTracker`): a vector counts unless it belongs to a token
    that is left out, at any position. Vectors of no token count too, for example those of an image.
    Layers that are called outside the model's own forward count all.

    If no token is left out, a call is followed only if it is the first of its shapes, or the model
    pads on its own, for example to blocks.

    `leaders`: by the shapes of their tokens, for all calls of the model, which may alternate."""

    def __init__(
        self,
        model: nn.Module,
        rule: Rule | None = None,
        leaders: dict[Hashable, Leader] | None = None,
    ):
        self.model, self.rule = model, rule or token_masks
        self.is_own = rule is not None
        self.leaders = {} if leaders is None else leaders
        self._forget()

    def _forget(self) -> None:
        self.tokens = TokenTracker()
        self.masks: list[Tensor] = []  # those that leave something out
        self.decoder_mask = self.unplaced = None
        self.key: Hashable = None  # among the leaders, of a call of which all tokens count
        self.leader: Leader | None = None
        self.waiting: Callable[[], None] | None = None  # marks the tokens, if the call is followed
        self.is_same = False  # the decoder's mask is the encoder's: its tokens are made of those
        self.latest: tuple[Any, Tensor | None] = (None, None)
        self.scope: AbstractContextManager[object] = nullcontext()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Follow the model's calls inside the context."""
        hooks = [
            self.model.register_forward_pre_hook(self._begin, with_kwargs=True),
            self.model.register_forward_hook(self._end, always_call=True),
        ]
        decoder = decoder_of(self.model)
        if decoder is not None:
            hook = decoder.register_forward_pre_hook(self.enter_decoder, with_kwargs=True)
            hooks.append(hook)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.enter(module, args, kwargs)
        self.scope = following(self)
        self.scope.__enter__()

    def _end(self, module: nn.Module, args: tuple, output: object) -> None:
        self.scope.__exit__(None, None, None)
        if output is None and self.leads:  # the call has failed
            self.leaders.pop(self.key, None)
        self.finish()
        self._forget()

    @property
    def leads(self) -> bool:
        return self.leader is not None and self.leader.tokens is self.tokens

    def finish(self) -> None:
        """End a call."""
        if self.leader is not None and self.leads:
            self.leader.is_done = True

    def begin(self) -> None:
        """Begin a call: decide whether it is followed."""
        mark, self.waiting = self.waiting, None
        if mark is not None and self.leader is not None and self.leader.may_leave_out:
            self.leader = None
            mark()

    def enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Handle a call of the model."""
        self._forget()
        inputs = _arguments(module, args, kwargs)
        is_given = any(inputs.get(key) is not None for key in DECODER_INPUTS)
        if decoder_of(module) is not None and not is_given:
            inputs["decoder_input_ids"] = inputs.get("labels")  # as long as the ids made of them
        masks = self.rule(inputs)
        first, second = map(_partial, masks if isinstance(masks, tuple) else (masks, None))
        shape = _token_shape(inputs, "")
        if first is None and not self.is_own and shape is not None:
            first = torch.ones(shape, dtype=torch.bool)  # some models pad to blocks
            if second is not None:
                return self._place(module, inputs, first, second)
            given = frozenset(name for name, value in inputs.items() if value is not None)
            self.key = shape, _token_shape(inputs, "decoder_"), given
            mark = partial(self._place, module, inputs, first, None)
            if self.key in self.leaders:
                self.leader, self.waiting = self.leaders[self.key], mark
                return
            self.leader = self.leaders[self.key] = Leader(self.tokens)
            return mark()
        self._place(module, inputs, first, second)

    def _place(
        self, module: nn.Module, inputs: Json, first: Tensor | None, second: Tensor | None
    ) -> None:
        """Mark the tokens in the inputs; a decoder's are marked when it is called."""
        self.masks = [mask for mask in (first, second) if mask is not None]
        if first is not None:
            self.unplaced = None if self._mark(_sources(module, inputs), first) else first
        if decoder_of(module) is not None:
            is_given = any(inputs.get(key) is not None for key in DECODER_INPUTS)
            self.decoder_mask, self.is_same = (second, False) if is_given else (first, True)
        elif second is not None:
            self._mark_decoder(inputs, "decoder_", second)

    def enter_decoder(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Handle a call of the model's decoder."""
        if self.decoder_mask is not None:
            self._mark_decoder(_arguments(module, args, kwargs), "", self.decoder_mask)

    def _mark_decoder(self, inputs: Mapping[str, Any], prefix: str, mask: Tensor) -> None:
        sources = [inputs.get(f"{prefix}{key}") for key in ("input_ids", "inputs_embeds")]
        if not self._mark(sources, mask) and not self.is_same:
            raise Failed(
                f"the call has no tokens of a decoder for a mask of {tuple(mask.shape)}",
                expected="decoder_input_ids or labels of the mask's shape",
                where="collect",
                hint="give texts of one length, or mask=",
                code="AK903",
            )

    def _mark(self, sources: Sequence[Any], mask: Tensor) -> bool:
        """Mark the sources of the mask's shape; return whether there is one."""
        fit = [
            x
            for x in sources
            if isinstance(x, Tensor) and x.dim() > 1 and x.shape[:2] == mask.shape
        ]
        for x in fit:
            self.tokens.mark(x, mask)
        return bool(fit)

    def of(self, path: str, x: Tensor) -> Tensor | None:
        """The mask of a layer's input x (..., in), one object for layers that share it; None if all
        of it counts; `Failed` if it is unknown."""
        if not self.masks:
            if self.leader is not None and self.leader.leaves_out:
                raise self._unknown(path, x)
            return None
        key = (self.tokens.found(x), x.shape, x.stride(), x.storage_offset())
        if key[0] is None or key != self.latest[0]:
            self.tokens.is_paused = True
            try:
                self.latest = key, self._of(path, x)
            finally:
                self.tokens.is_paused = False
            if self.leader is not None and self.latest[1] is not None:
                self.leader.leaves_out = True
        return self.latest[1]

    def _of(self, path: str, x: Tensor) -> Tensor | None:
        tags = self.tokens.found(x)
        if tags is not None and tags.is_whole:
            return None
        bits = self.tokens.of_vectors(x)
        if bits is None:
            if self.unplaced is None:
                return None
            # the caller's rule for inputs other than text
            if self.is_own and x.shape[:-1] == self.unplaced.shape:
                return self.unplaced
            raise self._unknown(path, x)
        if bool((bits == BOTH).any()):
            if bits.shape == self.masks[0].shape[:1]:  # a vector for each text, of all its tokens
                return None
            return self._arranged(path, x, bits)
        return _partial(bits != LEFT_OUT)

    def _arranged(self, path: str, x: Tensor, bits: Tensor) -> Tensor | None:
        """The mask of vectors of which some belong to several tokens, such as a state and a token:
        in the only order of the tokens that agrees with the vectors of one token."""
        alone = bits != BOTH
        found: list[Tensor] = []
        for mask in self.masks:
            for order in (mask, mask.T, mask.flatten(), mask.T.flatten()):
                flags = order.to(x.device)
                fits = flags.shape == bits.shape and bool(alone.any())
                if fits and torch.equal(flags[alone], bits[alone] == COUNTED):
                    found.append(flags)
        if not found or any(not torch.equal(flags, found[0]) for flags in found):
            raise self._unknown(path, x)
        return _partial(found[0])

    def _unknown(self, path: str, x: Tensor) -> Failed:
        shapes = " and ".join(str(tuple(mask.shape)) for mask in self.masks) or "an earlier batch"
        return Failed(
            f"{shown(path)} saw an input of {tuple(x.shape)}, and which of its vectors are of the "
            f"tokens that count, by a mask of {shapes}, is not known",
            expected="vectors of one token each",
            where="collect",
            hint="give texts of one length, or mask=, or exclude the layer from targets",
            code="AK903",
        )


def _sources(module: nn.Module, inputs: Mapping[str, Any]) -> list[Any]:
    """The arguments with a model's tokens; an encoder's states, if only those are given."""
    names = ("input_ids", "inputs_embeds", getattr(module, "main_input_name", "input_ids"))
    states = inputs.get("encoder_outputs")
    given = [inputs.get(name) for name in dict.fromkeys(names)]
    return given if states is None else [*given, states[0]]


def _arguments(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a module's forward by name."""
    signature = inspect.signature(module.forward)
    inputs = dict(signature.bind_partial(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            inputs |= inputs.pop(name, {})
    return inputs


def _partial(mask: Tensor | None) -> Tensor | None:
    """A mask that leaves something out, as flags; else None."""
    return None if mask is None or bool(mask.all()) else mask.bool()


def following(masks: Masks | None) -> AbstractContextManager[object]:
    """A context that follows tokens if some are left out."""
    if masks is not None:
        masks.begin()
    return nullcontext() if masks is None or not masks.masks else masks.tokens


def decoder_of(model: nn.Module) -> nn.Module | None:
    """The decoder of a transformers model that also has an encoder."""
    config = getattr(model, "config", None)
    if not getattr(config, "is_encoder_decoder", False):
        return None
    decoder: Any = getattr(model, "get_decoder", lambda: None)()
    return decoder if isinstance(decoder, nn.Module) and decoder is not model else None

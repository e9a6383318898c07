"""Hooks on the layers whose inputs are summed, while batches take turns in the model."""

from collections.abc import Hashable, Mapping
from typing import Any

from torch import Tensor, nn

from adapterkit.verbs.stats.data.masks import Leader, Masks, decoder_of
from adapterkit.verbs.stats.model.coroutines import Coroutine
from adapterkit.verbs.stats.sums import Sums


class SumsWatch:
    """Adds what layers see to sums, as a context.

    `masks` is to be set to those of the batch that runs; None: all vectors count. `stops`: modules
    whose forward, called by a pass, runs elsewhere: what they see is told by `record_input`.
    """

    def __init__(self, model: nn.Module, modules: Mapping[str, nn.Module]):
        self.model, self.modules = model, modules
        self.sums: Sums | None = None  # nothing is added without
        self.masks: Masks | None = None
        self.stops: set[nn.Module] = set()
        self._leaders: dict[Hashable, Leader] = {}
        self._hooks: list[Any] = []

    def masks_of(self, batch: Mapping[str, Tensor]) -> Masks:
        """The masks of a batch."""
        masks = Masks(self.model, leaders=self._leaders)
        masks.enter(self.model, (), dict(batch))
        return masks

    def __enter__(self) -> "SumsWatch":
        for name, module in self.modules.items():
            hook = module.register_forward_pre_hook(self._see(name), with_kwargs=True)
            self._hooks.append(hook)
        decoder = decoder_of(self.model) if self.modules else None
        if decoder is not None:
            hook = decoder.register_forward_pre_hook(self._enter_decoder, with_kwargs=True)
            self._hooks.append(hook)
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _see(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            if module not in self.stops or Coroutine.current() is None:
                self.record_input(name, args, kwargs)

        return hook

    def record_input(self, name: str, args: tuple, kwargs: dict[str, Any]) -> None:
        """Add the input of a layer that is called."""
        if self.sums is not None and name in self.modules:
            x = args[0] if args else next(iter(kwargs.values()))
            self.sums.add(name, x, None if self.masks is None else self.masks.of(name, x))

    def _enter_decoder(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self.masks is not None:
            self.masks.enter_decoder(module, args, kwargs)

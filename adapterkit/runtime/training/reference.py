"""The reference of preference training (TRL's DPO, KTO, GRPO, RLOO): the model as it was when the
trainer was made, without a second one in memory."""

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from adapterkit.errors import Problems
from adapterkit.runtime.sharding import is_sharded, spread, whole
from adapterkit.runtime.site import CHILD, Part, Site, owner
from adapterkit.runtime.state import State

LOADER = "create_model_from_path"  # TRL's, by which its trainers load a reference
HEAD = "add_fused_lm_head"  # TRL's, of trainers that multiply by the head's weight themselves
WHERE = "trainer"

Values = list[tuple[Part, str, Tensor]]  # names of parameters and buffers in parts


class Reference(nn.Module):
    """A model with what its adapters were: calls run the model with those values.

    It has no parameters. TRL changes the forward of what it takes for a model of its own: that of
    the model itself, which it has changed as well, is run."""

    def __init__(self, model: nn.Module, values: Values):
        super().__init__()
        # in a tuple: a child would have the model's parameters
        self._policy = (model,)
        self._values = [(part, name, value.clone()) for part, name, value in values]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._as_it_was():
            return self._policy[0](*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "_policy":  # before there is one
            raise AttributeError(name)
        return getattr(self._policy[0], name)

    @contextmanager
    def _as_it_was(self) -> Iterator[None]:
        """The versions of the parameters stay, which backward compares."""
        # by name: FSDP2 puts other parameters into the parts
        before = [(_tensor(part, name), value) for part, name, value in self._values]
        present = [_exchange(now, value) for now, value in before]
        try:
            yield
        finally:
            for (now, _), value in zip(before, present, strict=True):
                _exchange(now, value)


def values_of(parts: list[Part]) -> Values:
    """What parts have now; no copies."""
    return [
        (part, name, value.data)
        for part in parts
        for name, value in (*part.named_parameters(), *part.named_buffers())
    ]


def _tensor(part: Part, name: str) -> Tensor:
    return getattr(*owner(part, name))


def _exchange(tensor: Tensor, value: Tensor) -> Tensor:
    """Give a tensor a whole value, and return what it had."""
    if is_sharded(tensor):
        own: Tensor = whole(tensor.detach()).clone()
        new: Any = spread(value.to(tensor.device), tensor)
        # in place: FSDP2 gathers from memory of its own
        tensor.to_local().data.copy_(new.to_local())
        return own
    own, tensor.data = tensor.data, value.to(tensor.device)
    return own


@contextmanager
def in_place_of_loaded(model: Any, cls: type, parts: list[Part]) -> Iterator[None]:
    """While a trainer of TRL is made, the reference that it would load is the model itself, as its
    adapters are now."""
    values = values_of(parts)
    own_path = getattr(getattr(model, "config", None), "_name_or_path", "")
    loaders = [(vars(module), vars(module)[LOADER]) for module in _modules(cls, LOADER)]
    for table, load in loaders:
        table[LOADER] = lambda path, load=load, **settings: (
            Reference(model, values) if path == own_path else load(path, **settings)
        )
    try:
        yield
    finally:
        for table, load in loaders:
            table[LOADER] = load
        for part, name, value in values:  # TRL casts what is trained on quantized bases
            tensor = _tensor(part, name)
            if tensor.dtype != value.dtype:
                tensor.data = value


def check(state: State, cls: type, arguments: Any) -> None:
    """`Refused` for settings with which a trainer of TRL would pass the adapters over."""
    errors = Problems(where=WHERE)
    if getattr(arguments, "use_vllm", False):
        errors.add(
            "use_vllm: TRL sends vLLM the base's weights alone",
            "generation by the model",
            "remove use_vllm",
        )
    if getattr(arguments, "sync_ref_model", False):
        errors.add(
            "sync_ref_model: the reference is the model with the adapters as they were",
            "a reference that stays",
            "remove sync_ref_model, or give ref_model= another model",
        )
    if _modules(cls, HEAD) and _acts_on_head(state):
        errors.add(
            f"adapters on the head, whose weight {cls.__name__} multiplies by itself",
            "adapters on other modules: those on the head would do nothing",
            "exclude the head from targets, modules_to_save and tied trainable_tokens",
        )
    errors.raise_all()


def _modules(cls: type, name: str) -> list[Any]:
    """The modules of a trainer's class, and of those that it derives from, that use a function of
    TRL."""
    modules = dict.fromkeys(sys.modules.get(each.__module__) for each in inspect.getmro(cls))
    return [module for module in modules if name in vars(module or object)]


def _acts_on_head(state: State) -> bool:
    ask: Any = getattr(state.model, "get_output_embeddings", None)
    head = None if ask is None else ask()
    site = None if head is None else head._modules.get(CHILD)
    return isinstance(site, Site) and any(name in site.parts for name in state.active)

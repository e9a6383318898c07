"""A pretended CUDA card, for machines without one: its tensors compute on the CPU, and what a real
card would refuse, or would race on, is an error.

- Operations that mix tensors of the card with tensors of the CPU are refused, as CUDA refuses them.
- Streams, events and the host have vector clocks. An access that is not ordered after the last
  write of the same memory (or a write not after the last reads), and memory that goes back to the
  stream it is of while another one may still use it, are noted in `Card.races`.
- A copy from the host that does not block must find its source unchanged until the host has waited
  for it; one to the host leaves garbage there until then.
"""

import importlib
import itertools
import pkgutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

import adapterkit.kernels

aten = torch.ops.aten
DEVICE = torch.device("cuda", 0)
GARBAGE = 0xA5
# what CUDA does with tensors of both kinds: copies, and indices that are on the CPU
MIXED = {
    aten.copy_.default,
    aten._to_copy.default,
    aten.index.Tensor,
    aten.index_put_.default,
    aten.index_put.default,
    aten._index_put_impl_.default,
}
WAITING = {  # the host needs the values, or their number
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.is_nonzero.default,
    aten.allclose.default,
}
Clock = dict[int, int]  # stream -> how many of its operations are known to have ended


class Mixed(AssertionError):
    """An operation on tensors of both devices."""


class CardStream:
    """A queue of operations, each ordered after those before it."""

    def __init__(self, card: "Card"):
        self.card, self.number = card, next(card.numbers)
        self.count, self.knows = 0, Clock()

    def _now(self) -> Clock:
        return self.knows | {self.number: self.count}

    def synchronize(self) -> None:
        self.card._host_waits(self._now())

    def wait_event(self, event: "CardEvent") -> None:
        _join(self.knows, event.clock)

    def wait_stream(self, other: "CardStream") -> None:
        _join(self.knows, other._now())

    def record_event(self) -> "CardEvent":
        event = CardEvent(self.card)
        event.record(self)
        return event


class CardEvent:
    def __init__(self, card: "Card"):
        self.card, self.clock = card, Clock()

    def record(self, stream: CardStream | None = None) -> None:
        self.clock = (stream or self.card.current())._now()

    def wait(self, stream: CardStream | None = None) -> None:
        (stream or self.card.current()).wait_event(self)

    def synchronize(self) -> None:
        self.card._host_waits(self.clock)

    def query(self) -> bool:
        return True


class Memory:
    """What tensors that share a storage share: who wrote and read it last."""

    def __init__(self, card: "Card", stream: CardStream):
        self.card, self.stream = card, stream
        self.write: tuple[CardStream, int, str] | None = None
        self.reads: list[tuple[CardStream, int, str]] = []
        self.held = False  # `record_stream`: goes back only when those streams are done

    def __del__(self):
        if self.held:
            return
        for stream, count, name in [*self.reads, *([self.write] if self.write else [])]:
            known = max(
                self.stream.knows.get(stream.number, 0), self.card.host.get(stream.number, 0)
            )
            if stream is not self.stream and known < count:
                self.card.races.append(
                    f"memory of stream {self.stream.number} is freed while {name} on stream "
                    f"{stream.number} may use it"
                )


class CardTensor(Tensor):
    """A tensor on the card; `held` is what it holds."""

    held: Tensor
    memory: Memory
    card: "Card"

    @staticmethod
    def __new__(cls, card: "Card", values: Tensor, memory: Memory | None = None):
        tensor = Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=torch.device("cpu"),  # to C++, which has no guard of CUDA in a build for the CPU
        )
        tensor.held, tensor.card = values, card
        tensor.memory = memory or Memory(card, card.current())
        return tensor

    # the types of torch's stubs do not know of overriding
    __torch_function__ = torch._C._disabled_torch_function_impl
    device = DEVICE
    is_cuda = True

    def numpy(self, *_, **__):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def tolist(self):
        return aten._to_copy.default(self, device=torch.device("cpu")).tolist()

    def cpu(self, *_, **__):
        return aten._to_copy.default(self, device=torch.device("cpu"))

    def __repr__(self, **_):
        return f"CardTensor({self.held!r})"

    def record_stream(self, s: Any) -> None:
        self.memory.held = True

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        card = next(x.card for x in tree_flatten((args, kwargs))[0] if isinstance(x, CardTensor))
        return card._compute(func, args, kwargs)


class _Mode(TorchFunctionMode):
    """What torch without CUDA would not let reach the dispatcher: tensors made on the card, copies
    to it, pinned memory."""

    def __init__(self, card: "Card"):
        super().__init__()
        self.card = card

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is Tensor.to:
            return self._to(*args, **kwargs)
        if func is torch.autocast:
            return func(*args, **kwargs)
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
            self.card.pin(1)
        if _is_card(kwargs.get("device")):
            flat = tree_flatten(args)[0]
            if kwargs.get("generator") is not None:
                raise Mixed(f"{func}: random numbers of the CPU for a tensor of the card")
            if any(isinstance(x, CardTensor) for x in flat):
                del kwargs["device"]
                return func(*args, **kwargs)
            return self.card.put(func(*args, **kwargs | {"device": "cpu"}))
        return func(*args, **kwargs)

    def _to(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        device, rest = kwargs.pop("device", None), []
        for arg in args:
            if isinstance(arg, (str, torch.device)):
                device = arg
            elif isinstance(arg, Tensor):
                device, kwargs["dtype"] = arg.device, arg.dtype
            else:
                rest.append(arg)
        on_card = isinstance(tensor, CardTensor)
        if _is_card(device) and not on_card:
            non_blocking = kwargs.pop("non_blocking", False)
            # CUDA copies the stored bytes and converts on the card
            made = self.card.put(torch.empty_like(tensor))
            made.copy_(tensor, non_blocking=non_blocking)
            return Tensor.to(made, *rest, **kwargs)
        if on_card and device is not None and not _is_card(device):
            return aten._to_copy.default(
                tensor if not rest else Tensor.to(tensor, *rest),
                device=torch.device("cpu"),
                **kwargs,
            )
        return Tensor.to(tensor, *rest, **kwargs)


class Card:
    """The state of the pretended card; `installed` puts it in torch's place of CUDA."""

    def __init__(self, memory: int = 80 << 30):
        self.numbers = itertools.count()
        self.lock = threading.RLock()
        self.races: list[str] = []
        self.host = Clock()
        self.flight: list[tuple[int, int, Any]] = []  # (stream, count, what to do once it is over)
        self.default = CardStream(self)
        self.here = threading.local()
        self.memory = memory
        self.waits = 0  # how often the host has waited
        self.streams_used: set[int] = set()
        self.pinned_buffers = 0
        self.fails_to_pin = False

    def current(self, device: Any = None) -> CardStream:
        return getattr(self.here, "stream", None) or self.default

    @contextmanager
    def stream(self, stream: CardStream | None) -> Iterator[None]:
        before = self.current()
        self.here.stream = stream or before
        try:
            yield
        finally:
            self.here.stream = before

    def put(self, values: Tensor) -> CardTensor:
        """A tensor that is written by the current stream."""
        with self.lock:
            made = CardTensor(self, values)
            self._access("make", [], [made.memory])
            return made

    def pin(self, count: int) -> None:
        if self.fails_to_pin:
            raise RuntimeError("CUDA error: out of memory")
        self.pinned_buffers += count

    def _host_waits(self, clock: Clock) -> None:
        with self.lock:
            self.waits += 1
            _join(self.host, clock)
            over = [f for f in self.flight if self.host.get(f[0], 0) >= f[1]]
            self.flight = [f for f in self.flight if self.host.get(f[0], 0) < f[1]]
        for _, _, end in over:
            end()

    def _access(self, name: str, reads: list[Memory], writes: list[Memory]) -> CardStream:
        stream = self.current()
        self.streams_used.add(stream.number)
        _join(stream.knows, self.host)
        stream.count += 1
        here = (stream, stream.count, name)
        for memory in {id(m): m for m in [*reads, *writes]}.values():
            is_written = any(memory is written for written in writes)
            earlier = [memory.write] if memory.write else []
            for other, count, what in [*earlier, *(memory.reads if is_written else [])]:
                if other is not stream and stream.knows.get(other.number, 0) < count:
                    self.races.append(
                        f"{name} on stream {stream.number} does not wait for {what} on stream "
                        f"{other.number}"
                    )
            if is_written:
                memory.write, memory.reads = here, []
            else:
                memory.reads.append(here)
        return stream

    def _compute(self, func: Any, args: tuple, kwargs: dict) -> Any:
        with self.lock:
            return self._computed(func, args, kwargs)

    def _computed(self, func: Any, args: tuple, kwargs: dict) -> Any:
        flat = tree_flatten((args, kwargs))[0]
        own = [x for x in flat if isinstance(x, CardTensor)]
        self._check(func, flat)
        if func is aten.copy_.default and own:
            done = self._copy(*args, **kwargs)
            if done is not None:
                return done
        target = kwargs.get("device")
        if func is aten._to_copy.default and target is not None and not _is_card(target):
            values = own[0].held.to(kwargs.get("dtype") or own[0].dtype)
            to = torch.empty_like(values)
            return self._copy(to, self._wrapped(values, own), kwargs.get("non_blocking", False))
        writes = _written(func, args, kwargs)
        written = [x.memory for x in writes if isinstance(x, CardTensor)]
        read = [x.memory for x in own if all(x is not w for w in writes)]
        plain_args, plain_kwargs = tree_map(_values, (args, kwargs))
        if "device" in plain_kwargs:
            plain_kwargs["device"] = torch.device("cpu")
        self._access(str(func), read, written)
        result = func(*plain_args, **plain_kwargs)
        if func in WAITING:
            self.current().synchronize()
        return tree_map(lambda x: self._wrapped(x, own) if isinstance(x, Tensor) else x, result)

    def _wrapped(self, values: Tensor, inputs: list[CardTensor]) -> CardTensor:
        for tensor in inputs:
            if tensor.held is values:
                return tensor
        place = values.untyped_storage().data_ptr()
        for tensor in inputs:
            if place and tensor.held.untyped_storage().data_ptr() == place:
                return CardTensor(self, values, tensor.memory)
        made = CardTensor(self, values)
        stream = self.current()
        made.memory.write = (stream, stream.count, "make")
        return made

    def _check(self, func: Any, flat: list) -> None:
        plain = [x for x in flat if isinstance(x, Tensor) and not isinstance(x, CardTensor)]
        if func not in MIXED and any(x.dim() for x in plain):
            raise Mixed(f"{func}: tensors of the card and of the CPU")
        if any(isinstance(x, torch.Generator) for x in flat):
            raise Mixed(f"{func}: random numbers of the CPU for a tensor of the card")
        is_copy = func in (aten.copy_.default, aten._to_copy.default)
        if func in MIXED and not is_copy and not isinstance(flat[0], CardTensor):
            raise Mixed(f"{func}: a tensor of the CPU is indexed by one of the card")

    def _copy(self, to: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor | None:
        """A copy between the host and the card; None for one within the card."""
        if isinstance(to, CardTensor) and isinstance(source, CardTensor):
            return None
        stream = self.current()
        if isinstance(to, CardTensor):
            self._access("copy from the host", [], [to.memory])
            to.held.copy_(source)
            if non_blocking:
                before = source.clone()
                self._fly(stream, lambda: self._unchanged(source, before))
            else:
                stream.synchronize()
            return to
        assert isinstance(source, CardTensor)
        self._access("copy to the host", [source.memory], [])
        if non_blocking:
            values = source.held.to(to.dtype, copy=True)
            if to.dtype == source.dtype and to.is_contiguous():
                to.view(-1).view(torch.uint8).fill_(GARBAGE)
            self._fly(stream, lambda: to.copy_(values))
        else:
            stream.synchronize()
            to.copy_(source.held)
        return to

    def _fly(self, stream: CardStream, end: Any) -> None:
        self.flight.append((stream.number, stream.count, end))

    def _unchanged(self, source: Tensor, before: Tensor) -> None:
        if not torch.equal(
            source.reshape(-1).view(torch.uint8), before.reshape(-1).view(torch.uint8)
        ):
            self.races.append("the source of a copy to the card was written during the copy")


def _join(clock: Clock, other: Clock) -> None:
    for stream, count in other.items():
        clock[stream] = max(clock.get(stream, 0), count)


def _values(x: Any) -> Any:
    return x.held if isinstance(x, CardTensor) else x


def _is_card(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _written(func: Any, args: tuple, kwargs: dict) -> list[Any]:
    """The arguments that an operation changes."""
    written = []
    for number, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[number] if number < len(args) else kwargs.get(argument.name)
            written += value if isinstance(value, (list, tuple)) else [value]
    return written


@contextmanager
def installed(card: Card) -> Iterator[Card]:
    """The card in torch's place of CUDA, in this thread and in those that are started meanwhile."""
    run = threading.Thread.run
    _forget_tables()

    def run_with_card(thread: threading.Thread) -> None:
        with _Mode(card):
            run(thread)

    # classes, as annotations of other packages name them
    init = CardStream.__init__
    stream = type("Stream", (CardStream,), {"__init__": lambda self, *_, **__: init(self, card)})
    init_event = CardEvent.__init__
    event = type("Event", (CardEvent,), {"__init__": lambda self, **_: init_event(self, card)})
    with pytest.MonkeyPatch.context() as patch, _Mode(card):
        patch.setattr(threading.Thread, "run", run_with_card)
        for name, value in {
            "device_count": lambda: 1,
            "is_available": lambda: True,
            "Stream": stream,
            "stream": card.stream,
            "current_stream": card.current,
            "Event": event,
            "mem_get_info": lambda device=None: (card.memory, card.memory),
            "get_device_name": lambda device=None: "pretended card",
            "get_device_capability": lambda device=None: (9, 0),
            "synchronize": lambda device=None: card.default.synchronize(),
            "empty_cache": lambda: None,
        }.items():
            patch.setattr(torch.cuda, name, value)
        yield card
        _forget_tables()


def _forget_tables() -> None:
    """Tables that kernels keep on a card are another one's."""
    for module in pkgutil.walk_packages(adapterkit.kernels.__path__, "adapterkit.kernels."):
        for value in vars(importlib.import_module(module.name)).values():
            getattr(value, "cache_clear", lambda: None)()

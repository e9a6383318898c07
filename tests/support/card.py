"""A pretended CUDA card, for machines without one: its tensors compute on the CPU, and what a real
card would refuse, or would race on, is an error.

- Operations that mix tensors of the card with tensors of the CPU are refused, as CUDA refuses them.
- Streams, events and the host have vector clocks. An access that is not ordered after the last
  write of the same memory (or a write not after the last reads), and memory that goes back to the
  stream it is of while another one may still use it, are noted in `Card.races`.
- A copy from pinned memory that does not block must find its source unchanged until the host has
  waited for it; one to pinned memory leaves garbage there until then. Copies of other memory wait.
- What an operation costs the host is counted: launches (operations that are no views), waits, and
  transfers over the bus. Operations on small matrices that CUDA checks for errors wait too.
- Freed memory serves the stream that it was of; only a full card takes it all back. Each stream's
  products have a workspace.
- Products of float32 lose 13 bits of their inputs where a setting of torch's allows TF32. What CUDA
  has no kernels for is refused, and so are random numbers of the process's own generator.
- `Card(kind="mps")` is one of Apple's, without streams: it has no float64.
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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

import adapterkit.kernels
import adapterkit.verbs.stats.data

aten = torch.ops.aten
DEVICE = torch.device("cuda", 0)  # the first one
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
# Operations are named without their overloads: in inference mode those arrive that are made of
# others.
WAITING = {  # the host needs the values, their number, or whether it went well
    "_local_scalar_dense", "item", "is_nonzero", "equal", "allclose", "nonzero", "masked_select",
    "_unique2", "unique_dim", "_linalg_check_errors", "linalg_svd", "_linalg_svd", "linalg_qr",
    "linalg_svdvals", "linalg_eigh", "_linalg_eigh", "linalg_eigvalsh", "linalg_inv", "linalg_pinv",
    "linalg_cholesky", "linalg_solve", "linalg_lstsq", "linalg_matrix_rank",
}  # fmt: skip
PRODUCTS = {
    "mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_", "mv", "addmv", "addmv_", "matmul",
    "linear", "dot", "vdot",
}  # fmt: skip
INDEX_PUT = {"index_put", "index_put_", "_index_put_impl_"}
SORTED = 32  # bytes of an element that is written by an index in deterministic mode
EIGEN = {"linalg_eigh", "_linalg_eigh", "linalg_eigvalsh"}
# draws for which a generator is given; without one they are the process's
DRAWS = {
    "rand", "randn", "randint", "randperm", "normal", "normal_", "uniform_", "bernoulli", "random_",
    "bernoulli_", "rand_like", "randn_like", "exponential_", "multinomial",
}  # fmt: skip
STORES = {"copy_", "_to_copy", "to", "clone", "detach", "cat"}  # what float8 is for on a GPU
TF32 = ~((1 << 13) - 1)
ROUNDING = 512  # bytes of memory that are given at a time
WORKSPACE = 32 << 20  # bytes of cuBLAS for each stream that has products
RING = 32  # torch's streams of a card
Clock = dict[int, int]  # stream -> how many of its operations are known to have ended


class Mixed(AssertionError):
    """An operation on tensors of both devices."""


class CardStream:
    """A queue of operations, each ordered after those before it."""

    def __init__(self, card: "Card", index: int = 0):
        self.card, self.number, self.index = card, next(card.numbers), index
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
        return all(self.card.host.get(stream, 0) >= count for stream, count in self.clock.items())


class Memory:
    """What tensors that share a storage share: who wrote and read it last."""

    def __init__(self, card: "Card", stream: CardStream, size: int):
        self.card, self.stream, self.device = card, stream, torch.device(card.kind, stream.index)
        self.size = 0  # until it is given
        self.write: tuple[CardStream, int, str] | None = None
        self.reads: list[tuple[CardStream, int, str]] = []
        self.held = False  # `record_stream`: goes back only when those streams are done
        card.memory_taken(stream.number, size := -(-size // ROUNDING) * ROUNDING)
        self.size = size

    def __del__(self):
        if self.size:
            self.card.pools[self.stream.number][0] -= self.size
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
        if card.kind == "mps" and values.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        tensor.held, tensor.card = values, card
        size = values.untyped_storage().nbytes()
        tensor.memory = memory or Memory(card, card.current(), size)
        return tensor

    # the types of torch's stubs do not know of overriding
    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def is_cuda(self) -> bool:
        return self.card.kind == "cuda"

    @property
    def device(self) -> torch.device:
        return self.memory.device

    def numpy(self, *_, **__):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def untyped_storage(self):
        return self.held.untyped_storage()

    def data_ptr(self):
        return self.held.data_ptr()

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
            return self.card.pin(func(*args, **kwargs))
        if func is Tensor.pin_memory:
            return self.card.pin(args[0].clone())
        if func is Tensor.is_pinned:
            return self.card.is_pinned(args[0])
        if _is_card(kwargs.get("device")):
            if func in (torch.tensor, torch.as_tensor):  # values of Python, in pageable memory
                return self._to(func(*args, **kwargs | {"device": "cpu"}), kwargs["device"])
            flat = tree_flatten(args)[0]
            if kwargs.get("generator") is not None:
                raise Mixed(f"{func}: random numbers of the CPU for a tensor of the card")
            if any(isinstance(x, CardTensor) for x in flat):
                del kwargs["device"]
                return func(*args, **kwargs)
            self.card.check_draw(func.__name__, kwargs)
            self.card.launches += func.__name__ != "empty"
            return self.card.put(func(*args, **kwargs | {"device": "cpu"}), kwargs["device"])
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
            made = self.card.put(torch.empty_like(tensor), device)
            made.copy_(tensor, non_blocking=non_blocking)
            return Tensor.to(made, *rest, **kwargs)
        if on_card and device is not None and not _is_card(device):
            return aten._to_copy.default(
                tensor if not rest else Tensor.to(tensor, *rest),
                device=torch.device("cpu"),
                **kwargs,
            )
        return Tensor.to(tensor, *rest, **kwargs)


class _Below(TorchDispatchMode):
    """The same below the dispatcher, as within another mode of that kind no `_Mode` acts: tensors
    made on the card, and copies to it."""

    def __init__(self, card: "Card"):
        super().__init__()
        self.card = card

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not _is_card(kwargs.get("device")):
            return func(*args, **kwargs)
        device = kwargs.pop("device")
        if any(isinstance(x, CardTensor) for x in tree_flatten(args)[0]):
            return func(*args, **kwargs)
        if func is aten._to_copy.default:
            made = self.card.put(torch.empty_like(args[0]), device)
            made.copy_(args[0], non_blocking=kwargs.get("non_blocking", False))
            return made if kwargs.get("dtype") is None else made.to(kwargs["dtype"])
        self.card.launches += "empty" not in func._schema.name
        return self.card.put(func(*args, **kwargs, device=torch.device("cpu")), device)


class Card:
    """The state of the pretended card, or of several; `installed` puts it in torch's place of
    CUDA."""

    def __init__(
        self,
        memory: int = 80 << 30,
        *,
        fails: str | None = None,
        count: int = 1,
        kind: str = "cuda",
    ):
        self.kind = kind
        self.numbers = itertools.count()
        self.lock = threading.RLock()
        self.races: list[str] = []
        self.host = Clock()
        self.flight: list[tuple[int, int, Any]] = []  # (stream, count, what to do once it is over)
        self.defaults = [CardStream(self, index) for index in range(count)]
        self.default = self.defaults[0]
        self.here = threading.local()
        self.memory = memory
        self.fails = fails  # what every operation raises: no kernels, or an error that stays
        self.waits = 0  # how often the host has waited
        self.streams_used: set[int] = set()
        self.launches = 0  # operations that are no views
        self.transfers = 0  # copies over the bus
        self.taken: dict[int, int] = {}  # by card: bytes of other processes
        self.pools: dict[int, list[int]] = {}  # by stream: bytes in use, and the most so far
        self.workspace = WORKSPACE
        self.workspaces: set[int] = set()  # streams that have one
        self.most_reserved = 0  # bytes
        self.rings: dict[int, list[CardStream]] = {}
        self.pinned: dict[int, Tensor] = {}  # kept for ever, as torch's allocator does
        self.pinned_buffers = 0
        self.pinned_bytes = 0
        self.fails_to_pin = False

    def current(self, device: Any = None) -> CardStream:
        """This thread's stream of a card: its current one's, or the default one of another."""
        stream = getattr(self.here, "stream", None) or self.default
        index = self.index_of(device)
        return stream if index == stream.index else self.defaults[index]

    def index_of(self, device: Any = None) -> int:
        """Of a device; without a number, of this thread's current one."""
        if isinstance(device, int):
            return device
        index = None if device is None else torch.device(device).index
        current: CardStream = getattr(self.here, "stream", None) or self.default
        return current.index if index is None else index

    @contextmanager
    def stream(self, stream: CardStream | None) -> Iterator[None]:
        before = self.current()
        self.here.stream = stream or before
        try:
            yield
        finally:
            self.here.stream = before

    def put(self, values: Tensor, device: Any = None) -> CardTensor:
        """A tensor that is written by the current stream."""
        with self.lock, self.stream(self.current(device)):
            made = CardTensor(self, values)
            self._access("make", [], [made.memory])
            return made

    def pin(self, memory: Tensor) -> Tensor:
        """Page-locked memory of the host; blocks are powers of 2."""
        if self.fails_to_pin:
            raise RuntimeError("CUDA error: out of memory")
        size = memory.untyped_storage().nbytes()
        if size:
            self.pinned_buffers += 1
            self.pinned_bytes += 1 << (size - 1).bit_length()
            self.pinned[memory.untyped_storage().data_ptr()] = memory
        return memory

    def is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self.pinned

    def memory_info(self, device: Any = None) -> tuple[int, int]:
        """(free, total) bytes of a card."""
        if self.fails:
            raise RuntimeError(self.fails)
        taken = self.taken.get(self.index_of(device), 0)
        return self.memory - self.reserved - taken, self.memory

    @property
    def reserved(self) -> int:
        pools = sum(most for _, most in self.pools.values())
        return pools + self.workspace * len(self.workspaces)

    @property
    def allocated(self) -> int:
        pools = sum(used for used, _ in self.pools.values())
        return pools + self.workspace * len(self.workspaces)

    def memory_taken(self, stream: int, size: int) -> None:
        """Memory for a tensor of a stream: what the stream has freed, else more of the card's; of a
        full card all streams' freed memory, behind a wait for everything."""
        pool = self.pools.setdefault(stream, [0, 0])
        pool[0] += size
        pool[1] = max(pool)
        if self.reserved > self.memory:
            for each in self.pools.values():
                each[1] = each[0]
            self.waits += 1
        if self.reserved > self.memory:
            pool[0] -= size
            pool[1] = pool[0]
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size} bytes")
        self.most_reserved = max(self.most_reserved, self.reserved)

    def new_stream(self, device: Any = None) -> CardStream:
        """torch's streams are taken from a ring: the 33rd is the first."""
        ring = self.rings.setdefault(self.index_of(device), [])
        if len(ring) < RING:
            ring.append(CardStream(self, self.index_of(device)))
        else:
            ring.append(ring.pop(0))
        return ring[-1]

    def check_draw(self, name: str, kwargs: dict) -> None:
        if name in DRAWS and kwargs.get("generator") is None:
            raise Mixed(f"{name}: random numbers of the process's generator")

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
        own = next(x for x in tree_flatten((args, kwargs))[0] if isinstance(x, CardTensor))
        with self.lock, self.stream(self.current(own.device)):  # as CUDA's guards do
            return self._computed(func, args, kwargs)

    def _computed(self, func: Any, args: tuple, kwargs: dict) -> Any:
        flat = tree_flatten((args, kwargs))[0]
        own = [x for x in flat if isinstance(x, CardTensor)]
        name = func._schema.name.removeprefix("aten::")
        if self.fails:
            raise RuntimeError(self.fails)
        self._check(func, flat)
        self._check_kernel(name, own, kwargs)
        if func is aten.copy_.default and own:
            done = self._copy(*args, **kwargs)
            if done is not None:
                return done
        target = kwargs.get("device")
        if func is aten._to_copy.default and target is not None and not _is_card(target):
            values = own[0].held.to(kwargs.get("dtype") or own[0].dtype)
            to, non_blocking = torch.empty_like(values), kwargs.get("non_blocking", False)
            if non_blocking and not self.fails_to_pin:
                self.pinned[to.untyped_storage().data_ptr()] = to  # torch's own
            return self._copy(to, self._wrapped(values, own), non_blocking)
        writes = _written(func, args, kwargs)
        written = [x.memory for x in writes if isinstance(x, CardTensor)]
        read = [x.memory for x in own if all(x is not w for w in writes)]
        plain_args, plain_kwargs = tree_map(_values, (args, kwargs))
        if "device" in plain_kwargs:
            plain_kwargs["device"] = torch.device("cpu")
        stream = self._access(str(func), read, written)
        if name in PRODUCTS:
            self._begin_workspace(stream.number)
            if _tf32_allowed():
                first = int("add" in name)  # what the product is added to stays
                plain_args = (*plain_args[:first], *tree_map(_as_tf32, plain_args[first:]))
        if name in INDEX_PUT and torch.are_deterministic_algorithms_enabled():
            self._sort_indices(stream.number, plain_args)
        result = func(*plain_args, **plain_kwargs)
        if name in WAITING or _selects(name, plain_args):
            self.current().synchronize()
        made = tree_map(lambda x: self._wrapped(x, own) if isinstance(x, Tensor) else x, result)
        new = [x for x in tree_flatten(made)[0] if isinstance(x, CardTensor) and x.numel()]
        is_view = all(any(x.memory is old.memory for old in own) for x in new)
        if (written or (new and not is_view)) and "empty" not in name:
            self.launches += 1
        return made

    def _sort_indices(self, stream: int, args: tuple) -> None:
        """In deterministic mode an index for each element is sorted, beside a copy."""
        if any(isinstance(index, Tensor) and index.dtype != torch.bool for index in args[1]):
            size = SORTED * args[0][tuple(args[1])].numel()
            self.memory_taken(stream, size)
            self.pools[stream][0] -= size

    def _begin_workspace(self, stream: int) -> None:
        if stream not in self.workspaces:
            self.workspaces.add(stream)
            if self.reserved > self.memory:
                self.workspaces.remove(stream)
                raise RuntimeError(
                    "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"
                )

    def _check_kernel(self, name: str, own: list[CardTensor], kwargs: dict) -> None:
        """What CUDA has no kernels for, or fails on."""
        if any(x.requires_grad for x in own) and torch.is_grad_enabled():
            raise Mixed(f"{name}: the pretended card has no gradients")
        if "generator" in kwargs or name in DRAWS:
            self.check_draw(name, kwargs)
        integers = name in PRODUCTS and not any(x.is_floating_point() for x in own)
        float8 = name not in STORES and any("float8" in str(x.dtype) for x in own)
        grouped = "grouped_mm" in name and any(x.dtype == torch.float32 for x in own)
        if integers or grouped:
            raise Mixed(f"{name}: CUDA has no such product of {own[0].dtype}")
        if float8:
            self._check_float8(name, own)
        if name in EIGEN and any(x.numel() and not x.held.any() for x in own):
            raise torch.linalg.LinAlgError(f"{name}: cuSOLVER fails on zeros")

    def _check_float8(self, name: str, own: list[CardTensor]) -> None:
        overload = getattr(aten, name, None)
        some = getattr(overload, overload.overloads()[0]) if overload else None
        if some is None or not (some.is_view or "empty" in name):
            raise Mixed(f"{name}: CUDA only stores float8")

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
        places = {x.device for x in flat if isinstance(x, CardTensor)}
        if len(places) > 1 and func not in MIXED:
            raise Mixed(f"{func}: tensors of two cards")
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
        self.transfers += 1
        host = source if isinstance(to, CardTensor) else to
        non_blocking = non_blocking and self.is_pinned(host)
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
    return device is not None and torch.device(device).type in ("cuda", "mps")


def _tf32_allowed() -> bool:
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):
        return matmul.fp32_precision == "tf32"
    return torch.get_float32_matmul_precision() != "highest"


def _as_tf32(x: Any) -> Any:
    if not isinstance(x, Tensor) or x.dtype != torch.float32:
        return x
    return x.clone().view(torch.int32).bitwise_and_(TF32).view(torch.float32)


def _selects(name: str, args: tuple) -> bool:
    """Whether a mask is used as an index: the host needs to know how many there are."""
    if name not in ("index", "index_put", "index_put_", "_index_put_impl_", "repeat_interleave"):
        return False
    if name == "repeat_interleave":
        return isinstance(args[-1], Tensor) and args[-1].dim() > 0
    return any(isinstance(x, Tensor) and x.dtype == torch.bool for x in args[1])


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
        with _Below(card), _Mode(card):
            run(thread)

    # classes, as annotations of other packages name them
    def begin(stream: Any, device: object = None, **_: object) -> None:
        stream.__dict__ = card.new_stream(device).__dict__

    stream = type("Stream", (CardStream,), {"__init__": begin})
    init_event = CardEvent.__init__
    event = type("Event", (CardEvent,), {"__init__": lambda self, **_: init_event(self, card)})
    with pytest.MonkeyPatch.context() as patch, _Below(card), _Mode(card):
        patch.setattr(threading.Thread, "run", run_with_card)
        for name, value in {
            "device_count": lambda: len(card.defaults),
            "current_device": card.index_of,
            "is_available": lambda: True,
            "Stream": stream,
            "stream": card.stream,
            "current_stream": card.current,
            "Event": event,
            "mem_get_info": card.memory_info,
            "memory_reserved": lambda device=None: card.reserved,
            "get_device_name": lambda device=None: "pretended card",
            "get_device_capability": lambda device=None: (9, 0),
            "synchronize": lambda device=None: card.defaults[card.index_of(device)].synchronize(),
            "memory_allocated": lambda device=None: card.allocated,
            "empty_cache": lambda: None,
            "_lazy_init": lambda: None,
        }.items():
            patch.setattr(torch.cuda, name, value)
        yield card
        _forget_tables()


def _forget_tables() -> None:
    """Tables that are kept on a card, and streams, are another one's."""
    packages = (adapterkit.kernels, adapterkit.verbs.stats.data)
    names = [m.name for p in packages for m in pkgutil.walk_packages(p.__path__, f"{p.__name__}.")]
    for name in (*names, "adapterkit.core.engine.device"):
        for value in vars(importlib.import_module(name)).values():
            getattr(value, "cache_clear", lambda: None)()


def move(module: torch.nn.Module) -> None:
    """Put a module's parameters and buffers on the card, which `to` cannot: for C++ they are on the
    CPU."""
    with torch.no_grad():
        for each in module.modules():
            for name, value in each._parameters.items():
                if value is not None:
                    there = value.detach().to(DEVICE)
                    each._parameters[name] = torch.nn.Parameter(there, value.requires_grad)
            for name, value in each._buffers.items():
                each._buffers[name] = None if value is None else value.to(DEVICE)

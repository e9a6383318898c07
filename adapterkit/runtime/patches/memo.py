"""Cache results of functions: the last one of tensors, some of plain values.

Some writes to a tensor do not count a version: those through `.data`, of fused optimizers and FSDP,
and to tensors made under `inference_mode`. So a cached result is checked against the tensors' bits,
which are read once. Reading would synchronize a GPU, so there the result is computed each time.
"""

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Generic, TypeVar, cast

import torch
from torch import Tensor

T = TypeVar("T")
MOST = 64  # results that a `ResultCache` has
APART = 65537  # words whose sum a larger tensor is known by: a prime, or rows could trade places


class Memo(Generic[T]):
    """Keeps one result until the bits of a tensor that it was computed from change.

    `waits`: also on a GPU, because the computation synchronizes too. Under autograd, results of
    trained tensors are computed each time."""

    def __init__(self, *, waits: bool = False) -> None:
        self.waits = waits
        self.made = 0  # how many results it had
        self.reset()

    def reset(self) -> None:
        self._bits: Tensor | None = None
        self._settings: tuple[Hashable, ...] | None = None
        self._value: T | None = None

    def __call__(
        self, compute: Callable[[], T], tensors: Sequence[Tensor | None], *settings: Hashable
    ) -> T:
        """`compute()`, or its last result if the tensors and settings are still the same; None: a
        tensor that is not known."""
        given = [tensor for tensor in tensors if tensor is not None]
        trained = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)
        is_read = not trained and len(given) == len(tensors)
        bits = bits_of(given, wait=self.waits) if is_read else None
        if bits is None:
            self.reset()
            self.made += 1
            return compute()
        if self._value is None or settings != self._settings or not same(bits, self._bits):
            # not an inference tensor, which no later backward could use
            with torch.inference_mode(False), torch.no_grad():
                self._value = compute()
            self._bits, self._settings = bits, settings
            self.made += 1
        return self._value

    def __reduce__(self):
        return partial(type(self), waits=self.waits), ()  # copies of a model start without


def bits_of(tensors: Sequence[Tensor], *, wait: bool) -> Tensor | None:
    """int64 that change with the values of tensors; None if these cannot be read: tensors inside
    tensors, on the meta device or, unless `wait`, outside the CPU."""
    for tensor in tensors:
        nested = getattr(tensor, "__tensor_flatten__", None) is not None
        if nested or tensor.is_meta or not (wait or tensor.device.type == "cpu"):
            return None
    with torch.no_grad():
        return torch.cat([_words(tensor).cpu() for tensor in tensors])


def same(bits: Tensor | None, others: Tensor | None) -> bool:
    """Return whether both could be read, and are equal."""
    return bits is not None and others is not None and torch.equal(bits, others)


def _words(tensor: Tensor) -> Tensor:
    flat = tensor.data.contiguous().view(-1).view(torch.uint8)
    flat = flat.clone() if flat.storage_offset() % 8 else flat
    whole = len(flat) // 8 * 8
    words, rest = flat[:whole].view(torch.int64), flat[whole:].to(torch.int64)
    if len(words) > APART:
        ends = len(words) // APART * APART
        sums = words[:ends].view(-1, APART).sum(0)
        sums[: len(words) - ends] += words[ends:]
        words = sums
    return torch.cat([words, rest])


class ResultCache:
    """Caches results for plain values, such as masks and indices on a device: a new one in each
    forward would be a copy that synchronizes a GPU."""

    def __init__(self) -> None:
        self._made: dict[tuple[Hashable, ...], object] = {}

    def __call__(self, make: Callable[..., T], *values: Hashable) -> T:
        key = make, *values
        if key not in self._made:
            if len(self._made) == MOST:
                self._made.clear()
            with torch.inference_mode(False), torch.no_grad():
                self._made[key] = make(*values)
        return cast(T, self._made[key])

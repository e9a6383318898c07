"""Results of functions that are kept: the last one of tensors, some of plain values."""

import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar, cast

import torch
from torch import Tensor

T = TypeVar("T")
MOST = 64  # results that a `MadeOnce` has


class Memo(Generic[T]):
    """Keeps one result until a tensor that it was computed from changes.

    Tensors that are trained now are taken to have changed, and what was kept goes: fused optimizers
    and FSDP write without counting a version.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self._stamps: list[tuple[weakref.ref[Tensor], int, int]] = []
        self._settings: tuple[Hashable, ...] | None = None
        self._value: T | None = None

    def __call__(self, compute: Callable[[], T], tensors: Sequence[Tensor], *settings: Hashable):
        """`compute()`, or its last result where the tensors and settings are the same still."""
        if torch.compiler.is_compiling():
            return compute()
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            self.forget()
            return compute()
        if self._value is None or settings != self._settings or not self._holds(tensors):
            # not an inference tensor, which no later backward could use
            with torch.inference_mode(False), torch.no_grad():
                self._value = compute()
            self._stamps = [(weakref.ref(t), _version(t), t.data_ptr()) for t in tensors]
            self._settings = settings
        return self._value

    def _holds(self, tensors: Sequence[Tensor]) -> bool:
        return len(tensors) == len(self._stamps) and all(
            ref() is tensor and version == _version(tensor) and pointer == tensor.data_ptr()
            for (ref, version, pointer), tensor in zip(self._stamps, tensors, strict=True)
        )

    def __reduce__(self):
        return type(self), ()  # copies of a model start without


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


class MadeOnce:
    """Keeps what functions make of plain values, such as masks and indices on a device: made anew
    in each forward, each would be a copy that a GPU waits for."""

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

"""The last result of a function of tensors."""

import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


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

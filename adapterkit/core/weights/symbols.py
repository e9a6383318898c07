"""Find slots by running transformers' own conversion on symbols.

transformers turns stored tensors into parameters with operations (stack the experts, concatenate
gate and up, chunk a fused projection, transpose, interleave, permute for rotary embeddings). Each
of them moves elements along axes. So instead of implementing them a second time, the operations
themselves run on `Symbol`s: tensors without data that record, axis by axis, the stored tensor and
position of each element. The results are the slots of the parameter."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch

from adapterkit.core.errors import Refused
from adapterkit.core.weights.parameters import Axis, Positions, Slot, Unsupported, identity_slot


class Symbol(torch.Tensor):
    """A tensor on the meta device that records where its elements are stored. `slots` cover it
    without overlap."""

    slots: tuple[Slot, ...]
    axis_split: _Split | None

    @staticmethod
    def of(key: str, shape: tuple[int, ...]) -> Symbol:
        return _symbol(shape, (identity_slot(key, shape),))

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        if name in _OPERATIONS:
            return _OPERATIONS[name](*args, **kwargs)
        if name in _QUESTIONS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        raise Unsupported(
            f"conversion by torch's {name!r}", expected="moves of elements along axes only"
        )


@dataclass(frozen=True)
class _Split:
    """A view that cut one axis into several (interleave, rotary permutation): that axis as an array
    of its positions."""

    axis: int
    positions: np.ndarray


def _symbol(shape, slots: tuple[Slot, ...], axis_split: _Split | None = None) -> Symbol:
    symbol = torch.empty(tuple(shape), device="meta").as_subclass(Symbol)
    symbol.slots, symbol.axis_split = slots, axis_split
    return symbol


def _positive(dim: int, ndim: int) -> int:
    return dim + ndim if dim < 0 else dim


def _plain(*symbols: Symbol) -> None:
    if any(s.axis_split is not None for s in symbols):
        raise Unsupported("an operation on an axis that a view has cut")


def _shift(slot: Slot, dim: int, by: int) -> Slot:
    axes = list(slot.axes)
    axes[dim] = replace(axes[dim], at=axes[dim].at + by)
    return replace(slot, axes=tuple(axes))


def _cat(tensors, dim: int = 0) -> Symbol:
    _plain(*tensors)
    dim = _positive(dim, tensors[0].ndim)
    if len({(*tensor.shape[:dim], *tensor.shape[dim + 1 :]) for tensor in tensors}) > 1:
        shapes = ", ".join(dict.fromkeys(str(tuple(tensor.shape)) for tensor in tensors))
        raise Refused(
            f"tensors of shapes {shapes}", expected="shapes that fit together", code="AK406"
        )
    slots, at = [], 0
    for tensor in tensors:
        slots += [_shift(slot, dim, at) for slot in tensor.slots]
        at += tensor.shape[dim]
    shape = list(tensors[0].shape)
    shape[dim] = at
    return _symbol(shape, tuple(slots))


def _unsqueeze(tensor: Symbol, dim: int) -> Symbol:
    _plain(tensor)
    dim = _positive(dim, tensor.ndim + 1)
    slots = tuple(
        replace(s, axes=(*s.axes[:dim], Axis(0, None, range(1)), *s.axes[dim:]))
        for s in tensor.slots
    )
    shape = list(tensor.shape)
    shape.insert(dim, 1)
    return _symbol(shape, slots)


def _stack(tensors, dim: int = 0) -> Symbol:
    return _cat([_unsqueeze(t, dim) for t in tensors], dim)


def _narrow(tensor: Symbol, dim: int, start: int, stop: int) -> Symbol:
    _plain(tensor)
    slots = []
    for slot in tensor.slots:
        axis = slot.axes[dim]
        low, high = max(axis.at, start), min(axis.stop, stop)
        if low < high:
            cut = Axis(low - start, axis.axis, axis.of[low - axis.at : high - axis.at])
            slots.append(replace(slot, axes=(*slot.axes[:dim], cut, *slot.axes[dim + 1 :])))
    shape = list(tensor.shape)
    shape[dim] = max(0, stop - start)
    return _symbol(shape, tuple(slots))


def _split(tensor: Symbol, sizes, dim: int = 0) -> tuple[Symbol, ...]:
    dim = _positive(dim, tensor.ndim)
    length = tensor.shape[dim]
    if isinstance(sizes, int):
        sizes = [min(sizes, length - at) for at in range(0, length, sizes)]
    parts, at = [], 0
    for size in sizes:
        parts.append(_narrow(tensor, dim, at, at + size))
        at += size
    return tuple(parts)


def _chunk(tensor: Symbol, chunks: int, dim: int = 0) -> tuple[Symbol, ...]:
    return _split(tensor, math.ceil(tensor.shape[_positive(dim, tensor.ndim)] / chunks), dim)


def _squeeze(tensor: Symbol, dim: int) -> Symbol:
    _plain(tensor)
    dim = _positive(dim, tensor.ndim)
    if tensor.shape[dim] != 1:
        return tensor
    if any(slot.axes[dim].axis is not None for slot in tensor.slots):
        raise Unsupported("a stored axis of length 1 dropped")
    slots = tuple(replace(s, axes=s.axes[:dim] + s.axes[dim + 1 :]) for s in tensor.slots)
    return _symbol(tensor.shape[:dim] + tensor.shape[dim + 1 :], slots)


def _select(tensor: Symbol, dim: int, index: int) -> Symbol:
    """One position of an axis. The stored axis, if there is one, stays as an unnamed position: only
    stacks can be undone."""
    return _squeeze(_narrow(tensor, dim, index, index + 1), dim)


def _unbind(tensor: Symbol, dim: int = 0) -> tuple[Symbol, ...]:
    dim = _positive(dim, tensor.ndim)
    return tuple(_select(tensor, dim, i) for i in range(tensor.shape[dim]))


def _transpose(tensor: Symbol, dim0: int, dim1: int) -> Symbol:
    a, b = _positive(dim0, tensor.ndim), _positive(dim1, tensor.ndim)
    shape = list(tensor.shape)
    shape[a], shape[b] = shape[b], shape[a]
    if tensor.axis_split is not None:
        first, count = tensor.axis_split.axis, tensor.axis_split.positions.ndim
        if not (first <= a < first + count and first <= b < first + count):
            raise Unsupported("a transpose across an axis that a view has cut")
        turned = tensor.axis_split.positions.swapaxes(a - first, b - first)
        return _symbol(shape, tensor.slots, _Split(first, turned))
    slots = []
    for slot in tensor.slots:
        axes = list(slot.axes)
        axes[a], axes[b] = axes[b], axes[a]
        slots.append(replace(slot, axes=tuple(axes)))
    return _symbol(shape, tuple(slots))


def _reshape(tensor: Symbol, *shape) -> Symbol:
    shape = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else tuple(shape)
    with torch._C.DisableTorchFunctionSubclass():
        shape = tuple(torch.empty(tuple(tensor.shape), device="meta").reshape(shape).shape)
    old = tuple(tensor.shape)
    if shape == old:
        return tensor
    if tensor.axis_split is not None:
        return _join(tensor, shape)
    if len(shape) > len(old):
        # one axis cut into several: the axes before and after it stay
        extra = len(shape) - len(old)
        for axis in range(len(old)):
            if shape[:axis] == old[:axis] and shape[axis + extra + 1 :] == old[axis + 1 :]:
                positions = np.arange(old[axis]).reshape(shape[axis : axis + extra + 1])
                return _symbol(shape, tensor.slots, _Split(axis, positions))
    elif len(tensor.slots) == 1 and tensor.slots[0].is_full_tensor:
        # several stored axes joined to one (a convolution as a matrix): the bytes keep their order
        return _symbol(shape, (identity_slot(tensor.slots[0].key, shape),))
    raise Unsupported(f"a view of {old} as {shape}")


def _join(tensor: Symbol, shape: tuple[int, ...]) -> Symbol:
    split = tensor.axis_split
    assert split is not None
    axis, order = split.axis, split.positions.reshape(-1)
    count = split.positions.ndim
    joined = (*tensor.shape[:axis], len(order), *tensor.shape[axis + count :])
    if shape != joined:
        raise Unsupported(f"a view of {tuple(tensor.shape)} as {shape}")
    slots = []
    for slot in tensor.slots:
        old = slot.axes[axis]
        if old.at != 0 or len(old.of) != len(order):
            raise Unsupported("a permutation across several stored tensors")
        moved = Axis(0, old.axis, _compact(np.asarray(old.of)[order]))
        slots.append(replace(slot, axes=(*slot.axes[:axis], moved, *slot.axes[axis + 1 :])))
    return _symbol(shape, tuple(slots))


def _compact(positions: np.ndarray) -> Positions:
    if len(positions) > 1:
        step = int(positions[1] - positions[0])
        if step > 0 and (np.diff(positions) == step).all():
            return range(int(positions[0]), int(positions[-1]) + 1, step)
    return positions


def _getitem(tensor: Symbol, index) -> Symbol:
    index = index if isinstance(index, tuple) else (index,)
    dim = 0
    for part in index:
        if isinstance(part, int):
            tensor = _select(tensor, dim, _positive(part, tensor.shape[dim]))
            continue
        start, stop, step = part.indices(tensor.shape[dim])
        if step != 1:
            raise Unsupported("a slice with a step")
        tensor = _narrow(tensor, dim, start, stop)
        dim += 1
    return tensor


def narrowed(
    shape: tuple[int, ...], slots: tuple[Slot, ...], ranges: Iterable[tuple[int, int]]
) -> Symbol:
    """The piece of a parameter of these slots from a first to a last position of each axis."""
    symbol = _symbol(shape, slots)
    for dim, (start, stop) in enumerate(ranges):
        symbol = _narrow(symbol, dim, start, stop)
    return symbol


def _same(tensor: Symbol, *_, **__) -> Symbol:
    return tensor


# functions that only read a symbol's shape
_QUESTIONS = (
    "__get__", "size", "dim", "numel", "stride", "is_contiguous", "__repr__", "__len__"
)  # fmt: skip
_OPERATIONS = {
    "cat": _cat,
    "stack": _stack,
    "split": _split,
    "chunk": _chunk,
    "unbind": _unbind,
    "squeeze": _squeeze,
    "unsqueeze": _unsqueeze,
    "transpose": _transpose,
    "reshape": _reshape,
    "view": _reshape,
    "__getitem__": _getitem,
    "contiguous": _same,
    "to": _same,
    "clone": _same,
    "detach": _same,
}

"""Whole parameters of the loaded model, put together from the stored tensors that hold them."""

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from adapterkit.checkpoint.header import TensorSpec
from adapterkit.weights.names import Parameter
from adapterkit.weights.slots import Axis, Slot


class Reads(Protocol):
    def tensor(self, spec: TensorSpec) -> Tensor: ...


def read_parameter(
    parameter: Parameter, tensors: Mapping[str, TensorSpec], inputs: Reads
) -> Tensor:
    """The parameter's value, in the inputs' dtype."""
    if parameter.whole:
        return inputs.tensor(tensors[parameter.slots[0].key]).reshape(parameter.shape)
    whole: Tensor | None = None
    for slot in parameter.slots:
        part = _turned(inputs.tensor(tensors[slot.key]).reshape(slot.shape), slot)
        whole = part.new_empty(parameter.shape) if whole is None else whole
        whole[tuple(slice(axis.at, axis.stop) for axis in slot.axes)] = part
    assert whole is not None
    return whole


def _turned(stored: Tensor, slot: Slot) -> Tensor:
    """The slot's elements of its stored tensor, axes in the parameter's order."""
    for axis in slot.axes:
        if axis.axis is not None:
            stored = _chosen(stored, axis)
    order = [axis.axis for axis in slot.axes if axis.axis is not None]
    # a stored axis that the parameter lacks has one position left
    stored = stored.permute(order + [i for i in range(stored.dim()) if i not in order])
    return stored.reshape(tuple(len(axis.of) for axis in slot.axes))


def _chosen(stored: Tensor, axis: Axis) -> Tensor:
    assert axis.axis is not None
    if isinstance(axis.of, range) and axis.of.step == 1:
        return stored.narrow(axis.axis, axis.of.start, len(axis.of))
    return stored.index_select(axis.axis, torch.from_numpy(np.asarray(axis.of)).to(stored.device))

"""Parameters put together from stored tensors as their slots say."""

import torch


def gathered(parameter, stored):
    """The parameter put together from the stored tensors, NaN where no slot lies."""
    whole = torch.full(parameter.shape, torch.nan)
    for slot in parameter.slots:
        part = stored[slot.key].float().view(slot.shape)
        for axis in slot.axes:
            if axis.axis is not None:
                part = part.index_select(axis.axis, torch.tensor(list(axis.of)))
        part = part.permute([axis.axis for axis in slot.axes if axis.axis is not None])
        for i, axis in enumerate(slot.axes):
            part = part.unsqueeze(i) if axis.axis is None else part
        whole[tuple(slice(axis.at, axis.stop) for axis in slot.axes)] = part
    return whole

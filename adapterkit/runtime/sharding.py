"""Tensors that FSDP2 spreads over processes."""

from typing import TYPE_CHECKING, TypeGuard

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Whether a tensor is spread over processes."""
    return hasattr(tensor, "device_mesh")


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor, gathered on each process where it is sharded."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def spread(tensor: Tensor, other: Tensor) -> Tensor:
    """A whole tensor, the same on each process, sharded as another is."""
    if not is_sharded(other):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)

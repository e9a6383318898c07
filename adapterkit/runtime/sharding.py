"""Tensors that FSDP2 shards over processes."""

from typing import TYPE_CHECKING, TypeGuard

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Return whether a tensor is sharded over processes."""
    return hasattr(tensor, "device_mesh")


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor, gathered on each process if it is sharded."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def spread(tensor: Tensor, other: Tensor) -> Tensor:
    """Shard a full tensor, the same on each process, like another one."""
    if not is_sharded(other):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)

"""How many elements a kernel works on at once."""

from __future__ import annotations

from collections.abc import Sequence

from adapterkit.core.lazy import Tensor, torch

# What a launch and its wait cost is little beside the work on so many; 32 MB in float32.
GPU = 1 << 23


def piece(device: torch.device, cached: int) -> int:
    """`cached`, which a CPU keeps in its cache; on a GPU, which waits for its launches, many."""
    return cached if device.type == "cpu" else GPU


def padded(x: Tensor, widths: Sequence[int], value: float = 0) -> Tensor:
    """x with more elements at its ends, as `pad` counts them; itself where there are none, which
    `pad` copies."""
    return torch.nn.functional.pad(x, list(widths), value=value) if any(widths) else x

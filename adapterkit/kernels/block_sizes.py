"""The number of elements that a kernel processes at once."""

from __future__ import annotations

from collections.abc import Sequence

from adapterkit.core.lazy import Tensor, torch

# So many that a launch and its wait cost little in comparison; 32 MB in float32.
GPU = 1 << 23


def piece(device: torch.device, cached: int) -> int:
    """The number of elements per piece: `cached` on a CPU, whose cache they fit; many on a GPU,
    because each launch waits."""
    return cached if device.type == "cpu" else GPU


def padded(x: Tensor, widths: Sequence[int], value: float = 0) -> Tensor:
    """x padded as by `pad`; x itself if there is nothing to pad, because `pad` would copy it."""
    return torch.nn.functional.pad(x, list(widths), value=value) if any(widths) else x

"""Rows of GGUF tensors, in floats or in blocks, as float32 and back."""

from collections.abc import Callable

from adapterkit.core import dtypes
from adapterkit.core.lazy import Tensor, torch
from adapterkit.kernels.quant import compensated, ggml
from adapterkit.kernels.quant.grid import RoundColumn, check_finite
from adapterkit.kernels.quant.stochastic import Draws, round_to

FLOATS = ("F32", "F16", "BF16")


def is_written(name: str) -> bool:
    """Whether values can be encoded as that type of ggml."""
    return name in FLOATS or name in ggml.TYPES


def decode_rows(
    name: str,
    stored: Tensor,  # (rows, bytes) uint8
) -> Tensor:  # (rows, columns) float32
    """The values of rows of a type, exactly as ggml decodes them."""
    if name in FLOATS:
        return stored.view(dtypes.torch_dtype(name)).float()
    if name in ggml.TYPES:
        return ggml.decode(name, stored)
    import gguf
    import numpy as np

    with np.errstate(all="ignore"):  # values that are not finite are refused when written
        values = gguf.dequantize(stored.cpu().numpy(), gguf.GGMLQuantizationType[name])
    return torch.from_numpy(values).to(stored.device)


def encode_rows(
    name: str,
    rows: Tensor,  # (rows, columns) float32
    importance: Tensor | None = None,  # (columns,)
) -> Tensor:  # (rows, bytes) uint8
    """The rows in a type, with new scales. Raises ValueError for values that are not finite."""
    if name not in FLOATS:
        return ggml.encode(name, rows, importance)
    check_finite(rows)
    return rows.to(dtypes.torch_dtype(name)).contiguous().view(torch.uint8)


def requantize_rows(
    name: str,
    old: Tensor,  # (rows, bytes) uint8
    rows: Tensor,  # (rows, columns) float32
    draws: Draws | None,
    *,
    keep: bool,
    stay: bool = False,
    importance: Tensor | None = None,
) -> Tensor:  # (rows, bytes) uint8
    """New bytes of rows that were stored in a type; what does not change keeps its bytes."""
    if name not in FLOATS:
        how = {"draws": draws, "keep": keep, "stay": stay, "importance": importance}
        return ggml.requantize(name, old, rows, **how)
    if draws is None:
        return encode_rows(name, rows)
    check_finite(rows)
    return round_to(rows, dtypes.torch_dtype(name), draws).view(torch.uint8)


def column_rounder(name: str, stored: Tensor) -> RoundColumn:
    """Rounds columns of rows of a type to nearest, with the scales that are stored."""
    if name in FLOATS:
        return compensated.float_rounder(dtypes.torch_dtype(name))
    return ggml.round_column(name, stored)


def of_several(rounders: list[Callable], heights: list[int], order: Tensor | None) -> RoundColumn:
    """The rounding of columns whose values, in this order, belong to several tensors."""

    def round_column(w: Tensor, column: int | None) -> Tensor:
        at = None if order is None else order.to(w.device)
        parts = (w if at is None else w[at]).split(heights)
        pairs = zip(rounders, parts, strict=True)
        rounded = torch.cat([one(part, column) for one, part in pairs])
        return rounded if at is None else torch.empty_like(w).index_copy_(0, at, rounded)

    return round_column

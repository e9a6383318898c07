"""Scales of blocks in the order that cuBLAS reads them: tiles of 128 rows and 4 columns, in which
row 32·i + j is the (4·j + i)-th.

Source: https://docs.nvidia.com/cuda/cublas, "1D Block Scaling Factors Layout".
"""

import math

from torch import Tensor

ROWS, COLUMNS = 128, 4


def tiled_shape(rows: int, columns: int) -> tuple[int, int]:
    """The scales in whole tiles."""
    return math.ceil(rows / ROWS) * ROWS, math.ceil(columns / COLUMNS) * COLUMNS


def tiled(
    scale: Tensor,  # (rows, columns)
    old: Tensor | None = None,  # tiles: what is behind the last row and column; None: zeros
) -> Tensor:  # (down · 128, across · 4)
    rows, columns = tiled_shape(*scale.shape)
    whole = scale.new_zeros(rows, columns) if old is None else untiled(old, rows, columns)
    whole[: scale.shape[0], : scale.shape[1]] = scale
    tiles = whole.view(rows // ROWS, 4, 32, columns // COLUMNS, COLUMNS)
    return tiles.permute(0, 3, 2, 1, 4).reshape(rows, columns)


def untiled(stored: Tensor, rows: int, columns: int) -> Tensor:  # (rows, columns)
    """The inverse of `tiled`."""
    down, across = (
        size // each for size, each in zip(tiled_shape(rows, columns), (ROWS, COLUMNS), strict=True)
    )
    tiles = stored.reshape(down, across, 32, 4, COLUMNS).permute(0, 3, 2, 1, 4)
    return tiles.reshape(down * ROWS, across * COLUMNS)[:rows, :columns].clone()

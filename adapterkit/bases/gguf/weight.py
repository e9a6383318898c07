"""A parameter stored in a GGUF file, decoded to float32 and encoded again: rows of its tensors, in
floats or in blocks."""

import math
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

from adapterkit.bases.gguf.header import FLOATS
from adapterkit.bases.gguf.placement import Build, RowPlacement
from adapterkit.core import dtypes
from adapterkit.core.errors import Unrecoverable, shown
from adapterkit.core.lazy import Tensor, torch
from adapterkit.core.weights.codec import Parts, QuantizedWeight
from adapterkit.kernels.quant import compensated, ggml
from adapterkit.kernels.quant.grid import RoundColumn, check_finite
from adapterkit.kernels.quant.stochastic import Draws, round_to


def is_written(name: str) -> bool:
    """Return whether values can be encoded as that ggml type."""
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
    """Encode rows in a type, with new scales. Raises ValueError for values that are not finite."""
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
    """New bytes of rows that were stored in a type; unchanged blocks keep their bytes."""
    if name not in FLOATS:
        how = {"draws": draws, "keep": keep, "stay": stay, "importance": importance}
        return ggml.requantize(name, old, rows, **how)
    if draws is None:
        return encode_rows(name, rows)
    check_finite(rows)
    return round_to(rows, dtypes.torch_dtype(name), draws).view(torch.uint8)


def column_rounder(name: str, stored: Tensor) -> RoundColumn:
    """Round columns of rows of a type to nearest, with the stored scales."""
    if name in FLOATS:
        return compensated.float_rounder(dtypes.torch_dtype(name))
    return ggml.round_column(name, stored)


def of_several(rounders: list[Callable], heights: list[int], order: Tensor | None) -> RoundColumn:
    """Round columns whose values, in this order, belong to several tensors."""

    def round_column(w: Tensor, column: int | None) -> Tensor:
        at = None if order is None else order.to(w.device)
        parts = (w if at is None else w[at]).split(heights)
        pairs = zip(rounders, parts, strict=True)
        rounded = torch.cat([one(part, column) for one, part in pairs])
        return rounded if at is None else torch.empty_like(w).index_copy_(0, at, rounded)

    return round_column


def as_tensor(array: object) -> Tensor:
    """An array of transformers' code as a tensor."""
    import numpy as np

    return torch.from_numpy(np.require(array, requirements=["C", "W"]))


def converted(converter: Any, key: str, parts: Iterable[tuple[str, str | None, Tensor]]) -> Tensor:
    """The parameter that a converter of transformers' loader builds from tensors, each with its
    name and the converter's pattern that it matches."""
    converter = deepcopy(converter)
    for name, pattern, tensor in parts:
        converter.add_tensor(key, name, pattern, tensor)
    result: Any = converter.convert(key)[key]
    return result[0] if isinstance(result, list) else result


def _moved(rounder: RoundColumn, columns: Tensor) -> RoundColumn:
    """A column rounder of a parameter whose columns the file stores in this order."""
    place = torch.argsort(columns)
    numbers = place.tolist()

    def round_column(w: Tensor, column: int | None) -> Tensor:
        if column is not None:
            return rounder(w, numbers[column])
        return rounder(w[:, columns.to(w.device)], None)[:, place.to(w.device)]

    return round_column


@dataclass(frozen=True, kw_only=True)
class GgufWeight(QuantizedWeight):
    """One parameter, from one or several GGUF tensors (experts' gate and up), stored as rows."""

    name = "gguf"
    searches_scales = True

    types: tuple[str, ...]  # ggml's, of its parts
    shapes: tuple[tuple[int, ...], ...]  # of the GGUF tensors
    build: Build = field(compare=False)
    placement: RowPlacement | None = field(compare=False)
    # how it is written: with the scales that are there where the values fit, and with a weight for
    # each column of each matrix, by part
    keep_scales: bool = False
    has_fixed_scales: bool = False  # with those that are there whatever the values
    importance: tuple[Tensor | None, ...] = field(default=(), compare=False)

    @property
    def format(self) -> str:
        return ", ".join(dict.fromkeys(self.types))

    def types_written(self, changed_type: str | None) -> tuple[str, ...]:
        new = changed_type.upper() if changed_type else None
        return tuple(name if name in FLOATS else new or name for name in self.types)

    @property
    def read_only(self) -> str | None:
        unwritten = sorted({name for name in self.types if not is_written(name)})
        if unwritten:
            return f"its codes are of a codebook ({', '.join(unwritten)})"
        return None if self.placement else "its layout in the file cannot be restored"

    @property
    def rows_per_block(self) -> int | None:
        place = self.placement
        if place is None or not (place.plain or self.shape == self.shapes[0]):
            return None
        if len(self.shape) not in (2, 3):  # kernels' matrices are tiny
            return None
        if self.shape[-1] == self.row_width:
            return place.block
        # until a row of the parameter and one of the file end together
        rows = math.lcm(self.shape[-1], self.row_width) // self.shape[-1]
        return None if self.shape[-2] % rows else rows

    @property
    def row_width(self) -> int:
        is_plain = self.placement is not None and self.placement.plain
        return self.shapes[0][-1] if is_plain else self.shape[-1]

    def row_views(
        self, stored: dict[str, Tensor], matrix: int, first: int, last: int
    ) -> dict[str, Tensor]:
        (part,), at = self.parts, matrix * self.shape[-2]
        first, last = ((at + row) * self.shape[-1] // self.row_width for row in (first, last))
        return {part.key: stored[part.key][first:last]}

    def decode(self, stored: dict[str, Tensor]) -> Tensor:
        pairs = zip(self.types, self.values(stored), strict=True)
        rows = [decode_rows(name, part) for name, part in pairs]
        if self.placement is not None:
            return self.placement.join(rows, self.shape)
        return self._built(rows)

    def _built(self, rows: list[Tensor]) -> Tensor:
        """The parameter as transformers' code builds it, on the CPU."""
        import numpy as np

        arrays = {
            part.key: values.cpu().numpy().reshape(shape)
            for part, values, shape in zip(self.parts, rows, self.shapes, strict=True)
        }
        with np.errstate(all="ignore"):  # values that are not finite are refused when written
            weight = self.build(arrays.__getitem__)
        if tuple(weight.shape) != self.shape:
            raise Unrecoverable(
                f"{shown(self.key)} comes out as {tuple(weight.shape)}",
                expected=f"{self.shape}, each value where it was",
                where=self.file,
                hint="convert it with llama.cpp's own tools",
                code="AK406",
            )
        return weight.to(rows[0].device)

    def rows(
        self, stored: dict[str, Tensor], first: int, last: int
    ) -> tuple[QuantizedWeight, dict[str, Tensor]]:
        record, views = super().rows(stored, first, last)
        if record is not self and self.placement is not None and not self.placement.plain:
            record = replace(record, placement=self.placement.of_rows(first, last))
        if record is self or not self.importance:
            return record, views
        matrix = first // self.shape[-2]
        own = slice(matrix, matrix + 1)
        sums = tuple(one if one is None else one[own] for one in self.importance)
        return replace(record, importance=sums), views

    def _encoded(
        self, number: int, rows: Tensor, encode: Callable[[Tensor, slice, Tensor | None], Tensor]
    ) -> Tensor:
        """Encode rows of tensor `number` with the importance of their columns, matrix by matrix if
        each has its own."""
        sums = self.importance[number] if self.importance else None
        count = 1 if sums is None else len(sums)
        each = len(rows) // count
        new = []
        for matrix in range(count):
            own = slice(matrix * each, (matrix + 1) * each)
            weights = None if sums is None else sums[matrix].to(rows.device)
            new.append(encode(rows[own], own, weights))
        return new[0] if count == 1 else torch.cat(new)

    def encode(
        self, weight: Tensor, stored: Parts | None = None, draws: Draws | None = None
    ) -> Parts:
        assert self.placement is not None
        new, at, how = [], 0, {"keep": self.keep_scales, "stay": self.has_fixed_scales}
        olds = self.values(stored) if stored else [None] * len(self.types)
        parts = zip(self.types, olds, self.placement.split(weight), strict=True)
        for number, (name, old, rows) in enumerate(parts):

            def encode(some, own, weights, name=name, old=old, at=at):
                if old is None:
                    return encode_rows(name, some, weights)
                here = None if draws is None else draws.at(at + own.start * some.shape[-1])
                return requantize_rows(name, old[own], some, here, importance=weights, **how)

            new.append(self._encoded(number, rows, encode))
            at += rows.numel()
        return self.as_parts(*new)

    def encode_rounded(
        self, stored: dict[str, Tensor], weight: Tensor, draws: Draws | None = None
    ) -> dict[str, Tensor]:
        return replace(self, has_fixed_scales=True).encode_keeping_scales(
            stored, weight, draws or Draws(0)
        )

    def column_rounder(self, stored: dict[str, Tensor]) -> RoundColumn:
        assert self.placement is not None
        values, shift = self.values(stored), self.placement.shift
        pairs = zip(self.types, values, strict=True)
        rounders = [column_rounder(name, part) for name, part in pairs]
        rounder = of_several(rounders, [len(part) for part in values], self.placement.rows)
        if self.row_width != self.shape[-1]:  # only as a whole
            return lambda w, column: rounder(w.reshape(-1, self.row_width), column).view(w.shape)
        if self.placement.columns is not None:  # the file's column numbers
            return _moved(rounder, self.placement.columns)
        return (lambda w, column: rounder(w - shift, column) + shift) if shift else rounder

"""Quantized weights: one weight stored as several tensors, handled as the weight they decode to."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

from adapterkit.core import dtypes
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.checkpoint.layout import TensorPlan
from adapterkit.core.errors import AdapterkitError, Problems, Refused, Unrecoverable, listed, shown
from adapterkit.core.lazy import Tensor, torch
from adapterkit.core.records import Json
from adapterkit.core.registry import STABLE, Tier
from adapterkit.kernels.quant.grid import Grid, RoundColumn
from adapterkit.kernels.quant.stochastic import Draws
from adapterkit.kernels.sums import all_finite

if TYPE_CHECKING:
    from adapterkit.core.weights.decoded import CheckpointScan


Parts = dict[str, Tensor]  # stored tensors by key


@dataclass(frozen=True, kw_only=True)
class QuantizedWeight(TensorSpec):
    """One quantized weight among a checkpoint's tensors. Each format is a subclass (a codec) with a
    `name`.

    `key`, `shape` and `dtype` are those of the weight in the model without quantization; `dtype` is
    the one its library computes in. `file`, `start`, `stop` and `folder` are those of the tensor of
    codes. The weight is never read as bytes."""

    name: ClassVar[str]
    tier: ClassVar[Tier] = STABLE
    methods: ClassVar[tuple[str, ...]]  # values of a config's quant_method
    targets: ClassVar[tuple[str, ...]] = ()  # values of `quantize --to`
    # values of `quantize --to` for single-file image models
    image_targets: ClassVar[tuple[str, ...]] = ()
    # classes of modules whose weights it can store
    modules: ClassVar[tuple[str, ...]] = ("Linear", "Conv1D")
    # whether its loader accepts stacks of experts that are not quantized
    allows_plain_experts: ClassVar[bool] = True
    # whether its encoder searches the scales of least error; two may be equally good
    searches_scales: ClassVar[bool] = False
    # files next to config.json that declare a folder as quantized
    files: ClassVar[tuple[str, ...]] = ()

    parts: tuple[TensorSpec, ...]  # the stored tensors, the codes first
    transposed: bool = False  # the model keeps it (in, out), as GPT-2 does

    @classmethod
    def of(cls, parts: Iterable[TensorSpec], **fields: Any) -> Self:
        """The record of a weight stored in these tensors, the codes first."""
        parts = tuple(parts)
        codes = parts[0]
        fields |= {"start": codes.start, "stop": codes.stop, "folder": codes.folder}
        return cls(parts=parts, file=codes.file, **fields)

    @classmethod
    def encoding(cls, weight: PlainWeight, parts: Iterable[TensorSpec], **fields: object) -> Self:
        """The record of a weight that will be quantized into these tensors."""
        own = {"key": weight.key, "dtype": weight.dtype, "shape": weight.shape}
        return cls.of(parts, **own | fields)

    @classmethod
    def find(cls, scan: CheckpointScan) -> Iterator[QuantizedWeight]:
        """The weights of this format in a checkpoint; problems with some of them join
        `scan.errors`."""
        raise NotImplementedError

    @classmethod
    def for_encoding(
        cls, target: str, weight: PlainWeight, options: Json
    ) -> QuantizedWeight | None:
        """The record of a weight that will be quantized; None if its shape or its key does not
        allow it."""
        raise NotImplementedError

    @classmethod
    def config(cls, modules: QuantizedModules) -> Json:
        """The quantization_config of a model with such weights."""
        raise NotImplementedError

    @classmethod
    def replaces(cls, name: str, module: torch.nn.Module) -> bool:
        """Return whether the format's loader replaces a module that is not linear, unless the
        config excludes it."""
        return False

    @property
    def format(self) -> str:
        """The format's name in reports."""
        return self.name

    def types_written(self, changed_type: str | None) -> tuple[str, ...]:
        """The types in which changed values may be stored."""
        return (self.name,)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @property
    def max_outputs(self) -> tuple[TensorPlan, ...]:
        """The stored tensors that `encode` returns."""
        return tuple(TensorPlan(part.key, part.dtype, part.shape) for part in self.parts)

    @property
    def read_only(self) -> str | None:
        """The reason why it cannot be written, or None."""
        return None

    def contradiction(self, stored: Parts) -> tuple[str, str] | None:
        """A value of a part that contradicts the record, and the expected one; or None. It concerns
        parts that planning does not read in every folder."""
        return None

    def values(self, stored: Parts) -> list[Tensor]:
        """Its parts in order: the codes, usually their scales, and others."""
        return [stored[part.key] for part in self.parts]

    def out_in(self, weight: Tensor) -> Tensor:
        """The matrix (out, in) of a weight in the model's orientation, or the inverse."""
        return (weight.T if self.transposed else weight).contiguous()

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Its shape with all axes after the first as one."""
        return self.shape[0], math.prod(self.shape[1:])

    @property
    def code_dtype(self) -> torch.dtype:
        return dtypes.torch_dtype(self.parts[0].dtype)

    def stored_scale(self, stored: Parts | None) -> Tensor | None:
        """Its second part, if it is stored."""
        return stored[self.parts[1].key] if stored else None

    def as_parts(self, *tensors: Tensor) -> Parts:
        """New values of its first parts by key, in their shapes."""
        specs = self.parts[: len(tensors)]
        return {one.key: value.view(one.shape) for one, value in zip(specs, tensors, strict=True)}

    def decode(self, stored: Parts) -> Tensor:
        """The weight in float32, exactly code * scale, from the parts by key."""
        raise NotImplementedError

    def encode(
        self, weight: Tensor, stored: Parts | None = None, draws: Draws | None = None
    ) -> Parts:
        """The parts, by key, of a new value of the weight (float32, of `shape`), with new scales.

        For a stored weight, only the parts that change. Without draws a format may keep scales.
        With draws every format keeps its scales, except in blocks that lose less with new ones, and
        codes are sampled from the two neighbors: an unchanged value keeps its bytes. A draw belongs
        to an element of the weight ((out, in); stacks as they are), so rows may be encoded alone,
        with draws that start at them.

        Formats that are only read are refused while planning, by `check_writable`."""
        raise NotImplementedError

    def encode_keeping_scales(
        self, stored: Parts, weight: Tensor, draws: Draws | None = None
    ) -> Parts:
        """All parts of a new value of a stored weight. Parts that `encode` does not return are
        kept, such as the scale of a layer's inputs."""
        return stored | self.encode(weight, stored, draws)

    def grid(self, stored: Parts) -> Grid:
        """The values that a matrix, seen as (out, in), can hold with the scales of its parts."""
        raise NotImplementedError

    def column_rounder(self, stored: Parts) -> RoundColumn:
        """A function that rounds columns of a matrix, seen as (out, in), to nearest with the scales
        of its parts. `encode_rounded` encodes the result."""
        return self.grid(stored).round_column

    def encode_rounded(self, stored: Parts, weight: Tensor, draws: Draws | None = None) -> Parts:
        """All parts of values, with the existing scales; the values are representable with these,
        or sampled."""
        return self.encode_keeping_scales(stored, weight, draws or Draws(0))

    @property
    def rows_per_block(self) -> int | None:
        """The number of rows of a matrix (the last two axes) that decode and encode independently,
        as any number of such blocks does; the last may be short. None if only the whole weight
        does."""
        return None

    @property
    def row_width(self) -> int:
        """The number of values that are encoded together in a row."""
        return self.shape[-1]

    @property
    def row_axes(self) -> dict[int, tuple[int, int, int]]:
        """The layout of each part that rows do not share, by its number: (the axis of the part's
        matrix that counts rows, elements along it, rows in these elements). For example, (0, 1, 8)
        is eight rows in each element."""
        raise NotImplementedError

    def row_views(self, stored: Parts, matrix: int, first: int, last: int) -> Parts:
        """Views of the parts for rows [first, last) of one matrix, in whole blocks, without parts
        that all rows share."""
        views = {}
        for number, (axis, count, rows) in self.row_axes.items():
            key = self.parts[number].key
            part = stored[key]
            part = part.flatten(0, len(self.shape) - 3)[matrix] if len(self.shape) > 2 else part
            start, stop = first * count // rows, math.ceil(last * count / rows)
            views[key] = part.narrow(axis, start, stop - start)
        return views

    def split_nested(self, stored: Parts) -> tuple[QuantizedWeight, Parts]:
        """The weight without parts that span its blocks, such as quantized scales: a record, and
        its parts."""
        return self, stored

    def join_nested(self, stored: Parts) -> Parts:
        """The inverse of `split_nested`, for new parts."""
        return stored

    def row_ranges(self, elements: int) -> Iterator[tuple[int, int]]:
        """Yield ranges of rows for `rows` in order (all axes except the last as one). Each has
        about `elements` elements, at least a block; the first is the largest. Yield one range if
        the rows depend on each other."""
        count, each = math.prod(self.shape[:-1]), self.rows_per_block
        if each is None or count == 0:
            yield 0, count
            return
        height, step = self.shape[-2], max(1, elements // max(1, each * self.shape[-1])) * each
        for start in range(0, count, height):
            for first in range(start, start + height, step):
                yield first, min(first + step, start + height)

    def rows(self, stored: Parts, first: int, last: int) -> tuple[QuantizedWeight, Parts]:
        """One range of `row_ranges` as a weight: the record of a matrix of these rows, and its
        parts, as views of `stored` unless rows share them."""
        if (first, last) == (0, math.prod(self.shape[:-1])):
            return self, stored
        matrix, first_row = divmod(first, self.shape[-2])
        views = stored | self.row_views(stored, matrix, first_row, first_row + last - first)
        parts = tuple(replace(part, shape=tuple(views[part.key].shape)) for part in self.parts)
        return replace(self, shape=(last - first, self.shape[-1]), parts=parts), views


def stored_parts(spec: TensorSpec) -> tuple[TensorSpec, ...]:
    """The stored tensors of a tensor: several for a quantized weight."""
    return spec.parts if isinstance(spec, QuantizedWeight) else (spec,)


def read_parts(weight: QuantizedWeight, read: Callable[[TensorSpec], Tensor]) -> Parts:
    """The parts of a stored weight by key; `Unrecoverable` if they contradict its record."""
    stored = {part.key: read(part) for part in weight.parts}
    found = weight.contradiction(stored)
    if found is not None:
        problem, expected = found
        raise Unrecoverable(
            problem,
            expected=expected,
            where=weight.file,
            hint="download the checkpoint again and give its folder, because all of this is read "
            "there while planning",
            code="AK404",
        )
    return stored


def decode_checked(
    weight: QuantizedWeight,
    stored: Parts,
    hint: str = "keep it as floats with --skip, or choose another format",
) -> Tensor:
    """The weight in float32; `Unrecoverable` if it is not finite, for example at the limit of a
    scale."""
    value = weight.decode(stored)
    if not all_finite(value):
        raise Unrecoverable(
            f"{shown(weight.key)} decodes to values that are not finite (NaN or infinity)",
            expected="values that the format can hold",
            where=weight.file,
            hint=hint,
            code="AK208",
        )
    return value


def pair_in(value: object) -> tuple[int, int] | None:
    """Two positive sizes in a config; None for any other value."""
    if not isinstance(value, list | tuple) or len(value) != 2:
        return None
    first, second = value
    both = type(first) is type(second) is int and first > 0 and second > 0
    return (first, second) if both else None


def blocks_in(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """The number of blocks with one scale in a matrix, down and across; the last may be short."""
    return tuple(math.ceil(n / size) for n, size in zip(shape, block, strict=True))


def shapes_of_scales(grid: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The shapes in which the scales of a grid of blocks may be stored."""
    if grid == (1, 1):
        return [grid, (), (1,)]
    return [grid, grid[:1]] if grid[1] == 1 else [grid]


def check_block_size(size: int, known: Sequence[int]) -> None:
    """Refuse a block size that the format does not know."""
    if size not in known:
        raise Refused(
            f"--block-size {size} is not possible",
            expected=f"one of {', '.join(map(str, known))}",
            where="options",
            hint=f"give one of these, for example {known[1]}",
            code="AK101",
        )


def check_writable(weights: list[QuantizedWeight], where: str) -> list[AdapterkitError]:
    """Refusals of weights in formats that are only read."""
    errors = Problems(where=where, code="AK404")
    for reason in dict.fromkeys(weight.read_only for weight in weights if weight.read_only):
        keys = [weight.key for weight in weights if weight.read_only == reason]
        errors.add(
            f"{listed(keys)} cannot be written again: {reason}",
            "a format that can be written",
            "give --dequantize, or dequantize it first",
        )
    return errors


@dataclass(frozen=True)
class QuantizedModules:
    """The quantized modules of a model, as its config has to list them."""

    packed: dict[str, QuantizedWeight]  # by module
    # modules to exclude because the loader would quantize them; None if it excludes them itself
    skipped: list[str] | None
    others: list[str]  # all linear layers that are not quantized, also of derived classes


@dataclass(frozen=True)
class PlainWeight:
    """A float weight that will be quantized."""

    key: str
    shape: tuple[int, ...]  # (out, in)
    dtype: str
    transposed: bool = False  # it is stored (in, out)
    upcast: bool = False  # transformers casts it to float32 before it quantizes

    @property
    def model_shape(self) -> tuple[int, ...]:
        """The shape in the model."""
        return self.shape[::-1] if self.transposed else self.shape

    @property
    def has_weight_name(self) -> bool:
        """True if it is stored under its module's `weight`. For other names, transformers renames
        its scales as it does the weight, and loses them."""
        return self.key.endswith(".weight")

    def sibling(self, leaf: str, dtype: str, shape: tuple[int, ...]) -> TensorSpec:
        """A new tensor next to the weight, in its module."""
        return replace(self, key=self.key.removesuffix("weight")).part(leaf, dtype, shape)

    def part(self, ending: str, dtype: str, shape: tuple[int, ...]) -> TensorSpec:
        """A new tensor with the weight's key and an ending; it is in no file yet."""
        size = dtypes.size(dtype, math.prod(shape))
        return TensorSpec(self.key + ending, dtype, shape, "", 0, size)

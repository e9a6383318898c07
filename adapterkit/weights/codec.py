"""Quantized weights: one weight held by several stored tensors, seen as the weight that they decode to."""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from adapterkit import dtypes
from adapterkit.checkpoint.folder import LocalFolder
from adapterkit.checkpoint.header import TensorSpec
from adapterkit.checkpoint.layout import Stored
from adapterkit.checkpoint.reader import read_small
from adapterkit.checkpoint.spec import Checkpoint
from adapterkit.errors import AdapterkitError, Damaged, Refused, Unrecoverable, shown
from adapterkit.kernels.stochastic import Draws
from adapterkit.kernels.sums import all_finite
from adapterkit.weights.detect import without_quantization
from adapterkit.weights.names import Names

LARGE = (
    1 << 20
)  # bytes; scales of one weight that take more are looked at when they are decoded, not while planning


@dataclass(frozen=True, kw_only=True)
class QuantizedWeight(TensorSpec):
    """One quantized weight among a checkpoint's tensors; a format is a subclass, with what its arithmetic needs.

    `key`, `shape` and `dtype` are those of the weight as the model without quantization has it, `dtype` what its library computes
    in; `file`, `start`, `stop` and `folder` those of the tensor that holds the codes. It is never read as bytes.
    """

    name: ClassVar[str]
    methods: ClassVar[tuple[str, ...]]  # the quant_method of configs that it belongs to
    targets: ClassVar[tuple[str, ...]] = ()  # what `quantize --to` calls it
    modules: ClassVar[tuple[str, ...]] = (
        "Linear",
        "Conv1D",
    )  # classes of the model's modules whose weights it can hold
    allows_plain_experts: ClassVar[bool] = (
        True  # whether its loader leaves stacks of experts that are not quantized alone
    )
    files: ClassVar[
        tuple[str, ...]
    ] = ()  # beside config.json, what else of a folder says that it is quantized

    parts: tuple[TensorSpec, ...]  # what holds it, the codes first

    @classmethod
    def find(cls, found: "CheckpointScan") -> Iterator["QuantizedWeight"]:
        """The weights of this format; what is wrong with some of them joins `found.errors`."""
        raise NotImplementedError

    @classmethod
    def for_encoding(
        cls, target: str, weight: "PlainWeight", options: dict[str, Any]
    ) -> "QuantizedWeight | None":
        """The record of a weight that is to be quantized; None where its shape, or its name in the file, does not allow it."""
        raise NotImplementedError

    @classmethod
    def config(cls, choice: "QuantizedModules") -> dict[str, Any]:
        """The quantization_config of a model of such weights."""
        raise NotImplementedError

    @classmethod
    def replaces(cls, name: str, module: Any) -> bool:
        """Whether its loader takes a module, no linear layer, for one of such weights unless the config says that it is not."""
        return False

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @property
    def max_outputs(self) -> tuple[Stored, ...]:
        """The stored tensors that `encode` gives."""
        return tuple(Stored(part.key, part.dtype, part.shape) for part in self.parts)

    @property
    def variable_size(self) -> tuple[str, ...]:
        """Keys among them whose size depends on the values; as planned it is a guess."""
        return ()

    def decode(self, stored: dict[str, Tensor]) -> Tensor:
        """The weight in float32, exactly code * scale, of the parts by key."""
        raise NotImplementedError

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """The parts that hold a new value of the weight (float32, of `shape`), by key; they take the place of the old ones.

        `Refused` (at planning, by `check_writable`) for formats that are only read."""
        raise NotImplementedError

    def encode_keeping_scales(
        self, stored: dict[str, Tensor], weight: Tensor, draws: Draws | None = None
    ) -> dict[str, Tensor]:
        """All parts of a new value of a weight that is stored: what `encode` does not give, such as the scale of a layer's inputs,
        stays. For formats that keep more than that.

        With draws every format keeps its scales, but for blocks that lose less with new ones, and codes are drawn from the two
        neighbours: what does not move stays byte for byte. A draw belongs to an element of the weight (out, in; of stacks as they
        are), so that rows may be encoded by themselves, with draws that begin at them.
        """
        return stored | (
            self.encode(weight) if draws is None else self.encode_drawn(stored, weight, draws)
        )

    def encode_drawn(
        self, stored: dict[str, Tensor], weight: Tensor, draws: Draws
    ) -> dict[str, Tensor]:
        """The parts that change."""
        raise NotImplementedError

    @property
    def rows_per_block(self) -> int | None:
        """Rows of a matrix (the last two axes) that decode and encode without the others, as any number of such blocks does; the
        last may be short. None where only the whole weight does."""
        return None

    def row_views(
        self, stored: dict[str, Tensor], matrix: int, first: int, last: int
    ) -> dict[str, Tensor]:
        """Views of the parts that hold rows [first, last), whole blocks, of one of its matrices; parts that all rows share are not
        among them."""
        raise NotImplementedError

    def split_nested(
        self, stored: dict[str, Tensor]
    ) -> tuple["QuantizedWeight", dict[str, Tensor]]:
        """The weight without what spans its blocks, such as scales of scales: a record, and its parts."""
        return self, stored

    def join_nested(self, stored: dict[str, Tensor]) -> dict[str, Tensor]:
        """What `separated` undid, done again with new parts."""
        return stored

    def row_ranges(self, most: int) -> Iterator[tuple[int, int]]:
        """Ranges of rows (all axes but the last seen as one) that `rows` takes, in order: about `most` elements, a block at least,
        the first one the largest; one range where the rows need each other."""
        count, each = math.prod(self.shape[:-1]), self.rows_per_block
        if each is None or count == 0:
            yield 0, count
            return
        height, step = self.shape[-2], max(1, most // max(1, each * self.shape[-1])) * each
        for start in range(0, count, height):
            for first in range(start, start + height, step):
                yield first, min(first + step, start + height)

    def rows(
        self, stored: dict[str, Tensor], first: int, last: int
    ) -> tuple["QuantizedWeight", dict[str, Tensor]]:
        """One range of `slices` as a weight of its own: the record of a matrix of these rows, and its parts, views of those in
        `stored` where rows do not share them."""
        if (first, last) == (0, math.prod(self.shape[:-1])):
            return self, stored
        matrix, first_row = divmod(first, self.shape[-2])
        views = stored | self.row_views(stored, matrix, first_row, first_row + last - first)
        parts = tuple(replace(part, shape=tuple(views[part.key].shape)) for part in self.parts)
        return replace(self, shape=(last - first, self.shape[-1]), parts=parts), views

    @property
    def read_only(self) -> str | None:
        """Why it cannot be written, if it cannot."""
        return None


def decode_checked(
    packed: QuantizedWeight,
    stored: dict[str, Tensor],
    hint: str = "leave it out, or use another format",
) -> Tensor:
    """What the parts of a weight decode to; `Unrecoverable` where that is not finite, as at the edge of what a scale can hold."""
    value = packed.decode(stored)
    if not all_finite(value):
        found = f"{shown(packed.key)} decodes to values that are not finite (NaN or infinity)"
        raise Unrecoverable(
            found, expected="values that the format can hold", where=packed.file, hint=hint
        )
    return value


@dataclass(frozen=True)
class QuantizedModules:
    """Which modules of a model are quantized: what a config has to say."""

    packed: dict[str, QuantizedWeight]  # by module
    skipped: (
        list[str] | None
    )  # those that are not and that a loader which quantizes all it can would; None where it knows itself
    others: list[str]  # all linear layers that are not, of derived classes too


@dataclass(frozen=True)
class PlainWeight:
    """A float weight that is to be quantized."""

    key: str
    shape: tuple[int, ...]  # (out, in)
    dtype: str
    transposed: bool = False  # it is stored (in, out)
    wide: bool = False  # transformers makes it float32 before it quantizes

    def sibling(self, leaf: str, dtype: str, shape: tuple[int, ...]) -> TensorSpec:
        """A tensor of the module that holds it."""
        return replace(self, key=self.key.removesuffix("weight")).part(leaf, dtype, shape)

    @property
    def has_weight_name(self) -> bool:
        """Whether the loader finds what lies beside it: stored under another name than its module's `weight`, transformers would
        rename the scale as the weight."""
        return self.key.endswith(".weight")

    def part(self, ending: str, dtype: str, shape: tuple[int, ...]) -> TensorSpec:
        """One of the tensors that will hold it; they are in no file yet."""
        return TensorSpec(
            self.key + ending, dtype, shape, "", 0, dtypes.size(dtype, math.prod(shape))
        )


@dataclass
class CheckpointScan:
    """A checkpoint in which quantized weights are looked for: what the formats need of it, and what is wrong."""

    base: Checkpoint
    settings: dict[str, Any]  # the config's quantization_config
    tensors: dict[str, TensorSpec]  # what no format has claimed so far
    errors: list[AdapterkitError] = field(default_factory=list)
    _scales: list[tuple[TensorSpec, bool]] = field(
        default_factory=list
    )  # to be looked at; whether above 0
    _there: dict[str, bytes] = field(default_factory=dict)  # what was fetched

    @property
    def method(self) -> str:
        return str(self.settings.get("quant_method") or "").lower()

    def has_keys(self, *endings: str) -> bool:
        """Whether there are tensors with such keys."""
        return any(key.endswith(endings) for key in self.tensors)

    @cached_property
    def names(self) -> Names:
        """The names of the model without quantization."""
        return Names(
            replace(self.base, config=without_quantization(self.base.config)), build_model=True
        )

    def transposed(self, module: str) -> bool:
        """Whether the model without quantization keeps this module's weight (in, out), as GPT-2's Conv1D does."""
        return not self.names.plain and self.names.layer(module) == "Conv1D"

    def model_name(self, module: str) -> str:
        """What the loaded model calls the module whose weight is stored under `module.weight`."""
        model = self.names.model
        return (
            module if model is None else model.renamed(f"{module}.weight").removesuffix(".weight")
        )

    @property
    def compute_dtype(self) -> str:
        """The dtype that the config says the model has (header name); BF16 where it says none."""
        said = self.base.config.get("dtype") or self.base.config.get("torch_dtype")
        names = {word: name for name, word in dtypes.CONFIG_NAME.items()}
        return names.get(str(said).removeprefix("torch."), "BF16")

    def siblings(self, key: str, *endings: str) -> list[TensorSpec] | None:
        """The tensors `key + ending`; an error, and None, where one is missing."""
        lacking = [ending for ending in endings if key + ending not in self.tensors]
        if lacking:
            found = f"{shown(key)} without {', '.join(lacking)}"
            hint = "download the checkpoint again; without its scales the weight means nothing"
            self.errors.append(
                Damaged(
                    found, expected="the tensors that belong to it", where=self.base.name, hint=hint
                )
            )
            return None
        return [self.tensors[key + ending] for ending in endings]

    def check(self, key: str, fits: bool, found: str, expected: str) -> bool:
        """Note an error unless the shapes and dtypes fit."""
        if not fits:
            hint = "download the checkpoint again, or restore its config"
            self.errors.append(
                Damaged(
                    f"{shown(key)}: {found}", expected=expected, where=self.base.name, hint=hint
                )
            )
        return fits

    def refuse(
        self,
        found: str,
        expected: str,
        hint: str = "dequantize it first with the tool that made it",
    ) -> None:
        """Note a layout that nobody here reads."""
        self.errors.append(Refused(found, expected=expected, where=self.base.name, hint=hint))

    def read(self, spec: TensorSpec) -> Tensor:
        """A small stored tensor whose values say what others mean, now; `fetch` first where there are many."""
        import torch

        data = bytearray(self._bytes(spec))
        if not data:
            return torch.empty(spec.shape, dtype=dtypes.torch_dtype(spec.dtype))
        return torch.frombuffer(data, dtype=dtypes.torch_dtype(spec.dtype)).view(spec.shape)

    def read_json(self, spec: TensorSpec) -> dict[str, Any]:
        """A JSON text stored as a tensor of bytes; {} and an error where it is none."""
        try:
            value = json.loads(self._bytes(spec))
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            self.check(spec.key, False, "not a JSON object", "a JSON object as bytes")
            return {}
        return value

    def fetch(self, specs: Iterable[TensorSpec]) -> None:
        """Tensors that `read` and `read_json` will be asked for, in a few reads of each file."""
        self._there |= {spec.key: bytes(data) for spec, data in read_small(self.base.folder, specs)}

    def _bytes(self, spec: TensorSpec) -> bytes:
        there = self._there.get(spec.key)
        return self.base.folder.read(spec.file, spec.start, spec.stop) if there is None else there

    def check_finite(self, *scales: TensorSpec, positive: bool = False) -> None:
        """Scales that `look` is to find finite (0 is legal: a block of zeros has it), or also above 0."""
        self._scales += [(spec, positive) for spec in scales if spec.nbytes <= LARGE]

    def check_scales(self) -> None:
        """Note an error for each scale that is NaN or infinite; U8 are exponents, 255 NaN.

        Of a folder that is not here none is read: each would be a request, most for weights that no job touches, and those that
        are decoded are looked at then (`decode_checked`).
        """
        if not isinstance(self.base.folder, LocalFolder):
            return
        positive = {spec.key for spec, positive in self._scales if positive}
        for spec, data in read_small(self.base.folder, [spec for spec, _ in self._scales]):
            fine = _fine(spec.dtype, data, spec.key in positive)
            text = "scales that are NaN or infinite" + (spec.key in positive) * " or not above 0"
            self.check(spec.key, fine, text, "finite scales")


def _fine(dtype: str, data: memoryview, positive: bool) -> bool:
    """Whether all of a scale's values are finite, and above 0 if they have to be."""
    if dtype in ("F32", "F16", "F64"):  # without torch: there can be tens of thousands
        values = np.frombuffer(data, f"<f{dtypes.BITS[dtype] // 8}")
        return bool(np.isfinite(values).all()) and not (positive and bool((values <= 0).any()))
    if dtype == "BF16":
        values = (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
        return bool(np.isfinite(values).all()) and not (positive and bool((values <= 0).any()))
    if not data:
        return True
    import torch

    stored = torch.frombuffer(bytearray(data), dtype=dtypes.torch_dtype(dtype)).float()
    stored = stored.masked_fill_(stored == 255, math.nan) if dtype == "U8" else stored
    return bool(stored.isfinite().all()) and not (positive and bool((stored <= 0).any()))


Finder = Callable[[CheckpointScan], Iterator[QuantizedWeight]]


def check_writable(packed: list[QuantizedWeight], where: str) -> list[AdapterkitError]:
    """`Refused` for weights of formats that are only read."""
    errors: list[AdapterkitError] = []
    for reason in dict.fromkeys(p.read_only for p in packed if p.read_only):
        keys = [p.key for p in packed if p.read_only == reason]
        names = ", ".join(map(shown, keys[:3])) + (
            f" and {len(keys) - 3} more" if len(keys) > 3 else ""
        )
        found, hint = f"{names} cannot be written again: {reason}", "give --dequantize"
        errors.append(
            Refused(found, expected="a format that can be written", where=where, hint=hint)
        )
    return errors

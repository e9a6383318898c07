"""mlx: the affine integers and the floats in groups of MLX's models, and transformers' `metal`,
which are the same integers with other names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.errors import shown
from adapterkit.core.lazy import Tensor, torch
from adapterkit.core.records import Json
from adapterkit.core.weights.codec import Parts, QuantizedWeight
from adapterkit.core.weights.decoded import CheckpointScan
from adapterkit.core.weights.parameters import Slot, extent, identity_slot
from adapterkit.kernels.quant import affine, fp4, fp8
from adapterkit.kernels.quant.grid import MX_GROUP, NV_GROUP, WORD, Grid
from adapterkit.kernels.quant.stochastic import Draws

AFFINE, MXFP4, NVFP4, MXFP8 = "affine", "mxfp4", "nvfp4", "mxfp8"
BITS, SIZES = (2, 3, 4, 5, 6, 8), (32, 64, 128)  # of the affine mode; columns with one scale
# mode -> the bits and the columns that mlx takes if a setting names none; of floats the only ones
DEFAULTS = {AFFINE: (4, 64), MXFP4: (4, MX_GROUP), NVFP4: (4, NV_GROUP), MXFP8: (8, MX_GROUP)}
BIASES = {"mlx": ".biases", "metal": ".qbiases"}  # by the config's method
INNER = "language_model."  # transformers has it after `model.`, and the head outside
# of experts, (experts, out, in) each; transformers' stack -> mlx-lm's
STACK = re.compile(r"(.*)\.(switch_mlp|experts)\.\w+_proj\.weight")
STACKS = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "up_proj": ("up_proj",),
    "down_proj": ("down_proj",),
}


class Packing(NamedTuple):
    """How one weight is packed."""

    mode: str
    bits: int
    size: int  # columns with one scale

    @classmethod
    def of(cls, settings: Json) -> Packing | None:
        """The packing that settings declare; None if mlx does not have it."""
        mode: Any = settings.get("mode", AFFINE)
        if mode not in list(DEFAULTS):
            return None
        stated = (settings.get("bits"), settings.get("group_size"))
        pairs = zip(stated, DEFAULTS[mode], strict=True)
        bits, size = (default if one is None else one for one, default in pairs)
        if mode == AFFINE:
            known = bits in BITS and size in SIZES
        else:
            known = (bits, size) == DEFAULTS[mode]
        return cls(mode, bits, size) if known else None


@dataclass(frozen=True, kw_only=True)
class Mlx(QuantizedWeight):
    """W = code * scale + bias (affine); code * 2^(scale - 127) of FP4 and FP8 (mxfp4, mxfp8); code
    * scale of FP4 (nvfp4). Codes (out, in * bits / 32), scales (out, groups)."""

    name = "mlx"
    methods = ("mlx", "metal")
    searches_scales = True

    packing: Packing

    @classmethod
    def find(cls, scan: CheckpointScan) -> Iterator[QuantizedWeight]:
        found: list[TensorSpec] = []
        for module, spec in scan.with_ending(".weight") if scan.method in cls.methods else ():
            packing = _packing(scan, module, spec)
            if packing is None:
                continue
            biases = (BIASES[scan.method],) if packing.mode == AFFINE else ()
            siblings = scan.siblings(module, ".scales", *biases)
            if siblings is None or not _fits(scan, spec, siblings, packing):
                continue
            scan.check_finite(*siblings)
            weight = cls.of(
                (spec, *siblings),
                key=spec.key,
                dtype=siblings[0].dtype if packing.mode == AFFINE else scan.compute_dtype,
                shape=(*spec.shape[:-1], spec.shape[-1] * WORD // packing.bits),
                packing=packing,
            )
            found.append(weight)
            yield weight
        if found:
            scan.slots |= _slots(scan, found)

    def decode(self, stored: Parts) -> Tensor:
        words, *scales = self._matrices(stored)
        return affine.decode_words(words, self.packing.bits, self._grid(scales)).view(self.shape)

    def encode(
        self, weight: Tensor, stored: Parts | None = None, draws: Draws | None = None
    ) -> Parts:
        """Encode; a group keeps its scales, or gets new ones by mlx's rule if those are nearer to
        W."""
        assert stored is not None
        words, *scales = self._matrices(stored)
        rows = weight.reshape(-1, self.shape[-1]).contiguous()
        new = self._new_scales(rows, scales[0].dtype)
        how = (words, self.packing.bits, scales, new, self._grid, draws)
        return self.as_parts(*affine.requantize_words(rows, *how))

    def grid(self, stored: Parts) -> Grid:
        return self._grid(self._matrices(stored)[1:])

    @property
    def format(self) -> str:
        mode, bits, size = self.packing
        return f"mlx {bits} bits, groups of {size}" if mode == AFFINE else f"mlx {mode}"

    @property
    def rows_per_block(self) -> int | None:
        return 1

    @property
    def row_axes(self) -> dict[int, tuple[int, int, int]]:
        return dict.fromkeys(range(len(self.parts)), (0, 1, 1))

    def _matrices(self, stored: Parts) -> list[Tensor]:
        """Its parts as matrices, the rows of all experts below each other."""
        return [part.reshape(-1, part.shape[-1]) for part in self.values(stored)]

    def _grid(self, scales: Sequence[Tensor]) -> Grid:
        mode, bits, size = self.packing
        if mode == AFFINE:
            return affine.affine_grid(scales[0], scales[1], bits, size)
        if mode == MXFP4:
            return fp4.mxfp4_grid(scales[0])
        if mode == NVFP4:
            return fp4.nvfp4_grid(scales[0].view(torch.float8_e4m3fn), _one(scales[0]))
        shape = (len(scales[0]), scales[0].shape[1] * size)
        (grid,) = fp8.grids(scales[0], shape, (1, size))
        return grid

    def _new_scales(self, rows: Tensor, dtype: torch.dtype) -> Sequence[Tensor]:
        """By mlx's rule: for powers of 2 the least with which nothing saturates."""
        mode, bits, size = self.packing
        if mode == AFFINE:
            return affine.affine_scales(rows, bits, size, dtype)
        if mode == MXFP4:
            return [fp4.encode_mxfp4(rows, rule="up").scale]
        if mode == NVFP4:
            return [fp4.encode_nvfp4(rows, _one(rows)).scale.view(dtype)]
        power = {"rule": "power", "scale_dtype": torch.float8_e8m0fnu}
        return [fp8.encode_fp8(rows, (1, size), **power).scale.view(dtype)]


def _one(like: Tensor) -> fp4.TensorScale:
    """The scale of all groups, which mlx's nvfp4 does not have."""
    return fp4.TensorScale(torch.ones((), device=like.device), divides=False)


def _packing(scan: CheckpointScan, module: str, spec: TensorSpec) -> Packing | None:
    """The packing of a module's weight; None for floats, and with an error for others than mlx's
    and for weights that contradict the config."""
    own: Any = scan.settings.get(module, True)
    is_packed = spec.dtype == "U32"
    if own is False if is_packed else isinstance(own, dict):
        problem = f"stored as {spec.dtype}, and the config's setting is {shown(own)}"
        scan.check(spec.key, False, problem, "U32 for modules with settings, floats for false")
        return None
    own = own if isinstance(own, dict) else scan.settings
    packing = Packing.of(own) if is_packed else None
    if packing and f"{module}.global_scale" in scan.tensors:
        problem = f"{shown(module)}.global_scale, a scale of the whole matrix"
        scan.errors.add(problem, "nvfp4 without it", code="AK404")
        return None
    if is_packed and packing is None:
        names = ("mode", "bits", "group_size")
        said = ", ".join(f"{name} {shown(own[name])}" for name in names if name in own)
        expected = "affine of 2, 3, 4, 5, 6 or 8 bits in groups of 32, 64 or 128, mxfp4, nvfp4 of "
        expected += "16, or mxfp8"
        scan.errors.add(f"{shown(spec.key)}: MLX's {said}", expected, code="AK404")
    return packing


def _fits(
    scan: CheckpointScan, codes: TensorSpec, scales: list[TensorSpec], packing: Packing
) -> bool:
    """Return whether the words have a code for each column, and each group has its scales."""
    mode, bits, size = packing
    shape = (*codes.shape[:-1], codes.shape[-1] * WORD / bits / size)
    types = ("F16", "BF16", "F32") if mode == AFFINE else ("U8",)
    fits = len(codes.shape) in (2, 3) and 0 not in codes.shape and scales[0].dtype in types
    fits = fits and all((one.shape, one.dtype) == (shape, scales[0].dtype) for one in scales)
    specs = (f"{one.key.rpartition('.')[2]} {one.dtype} {one.shape}" for one in (codes, *scales))
    expected = f"words of {bits} bits, and {mode} scales for each {size} columns"
    return scan.check(codes.key, fits, ", ".join(specs), expected)


def _slots(scan: CheckpointScan, weights: Sequence[TensorSpec]) -> dict[str, tuple[Slot, ...]]:
    """Those of transformers' stacks of experts, of which mlx-lm stores gate and up apart, of
    convolutions, whose channels mlx-lm stores last, and of language models inside others."""
    shapes = {spec.key: spec.shape for spec in (*weights, *scan.tensors.values())}
    deep = {key: shape for key, shape in shapes.items() if len(shape) == 3}
    inner = [key for key in shapes if key.startswith(INNER)]
    model = scan.names.model if deep or inner else None
    if model is None:  # transformers does not know it
        return {}
    slots: dict[str, tuple[Slot, ...]] = {}

    def name_of(key: str) -> str:
        own, name = key.removeprefix(INNER), model.renamed(key)
        moved = own if own.startswith("lm_head") else own.replace("model.", f"model.{INNER}", 1)
        return moved if name not in model.state and moved in model.state else name

    def add(name: str, found: tuple[Slot, ...], *, unless: bool) -> None:
        value = model.state.get(name)
        if value is not None and extent(found) == value.shape and not unless:
            slots[name] = found

    for key in inner:
        name = name_of(key)
        add(name, (identity_slot(key, shapes[key]),), unless=name == model.renamed(key))
    for key, shape in deep.items():
        first, second, third = identity_slot(key, shape).axes
        turned = (Slot(key, shape, (first, third, second)),)
        add(name_of(key), turned, unless=extent(turned) == shape)
    for parent, child in {match.group(1, 2) for match in map(STACK.fullmatch, deep) if match}:
        experts = name_of(f"{parent}.experts.down_proj").rpartition(".")[0]
        for name, stored in STACKS.items():
            keys = [f"{parent}.{child}.{one}.weight" for one in stored]
            if deep.keys() >= {*keys}:
                joined = _below_each_other([(key, deep[key]) for key in keys])
                turned = scan.names.transposed_experts(experts)
                add(f"{experts}.{name}", joined, unless=turned)
    return slots


def _below_each_other(stacks: Sequence[tuple[str, tuple[int, ...]]]) -> tuple[Slot, ...]:
    """The slots of a stack whose rows are those of stored ones, one after the other."""
    slots, at = [], 0
    for key, shape in stacks:
        first, rows, columns = identity_slot(key, shape).axes
        slots.append(Slot(key, shape, (first, replace(rows, at=at), columns)))
        at += shape[1]
    return tuple(slots)

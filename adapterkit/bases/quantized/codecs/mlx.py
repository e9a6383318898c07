"""mlx: the affine integers and the floats in groups of MLX's models, and transformers' `metal`,
which are the same integers with other names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
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
from adapterkit.kernels.quant.grid import MX_GROUP, NV_GROUP, WORD, Grid, chosen, loses_less
from adapterkit.kernels.quant.stochastic import Draws

AFFINE, MXFP4, NVFP4, MXFP8 = "affine", "mxfp4", "nvfp4", "mxfp8"
SIZES = (32, 64, 128)  # columns with one scale, of the affine mode
# mode -> the bits and the columns that mlx takes if a setting names none; of floats the only ones
DEFAULTS = {AFFINE: (4, 64), MXFP4: (4, MX_GROUP), NVFP4: (4, NV_GROUP), MXFP8: (8, MX_GROUP)}
BIASES = {"": ".biases", "metal": ".qbiases"}  # by the config's quant_method


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
        mode = settings.get("mode", AFFINE)
        if not isinstance(mode, str) or mode not in DEFAULTS:
            return None
        stated = (settings.get("bits"), settings.get("group_size"))
        pairs = zip(stated, DEFAULTS[mode], strict=True)
        bits, size = (default if one is None else one for one, default in pairs)
        known = (
            bits in affine.BITS and size in SIZES
            if mode == AFFINE
            else ((bits, size) == DEFAULTS[mode])
        )
        return cls(mode, bits, size) if known and type(bits) is type(size) is int else None


@dataclass(frozen=True, kw_only=True)
class Mlx(QuantizedWeight):
    """W = code * scale + bias (affine); code * 2^(scale - 127) of FP4 and FP8 (mxfp4, mxfp8); code
    * scale of FP4 (nvfp4). Codes (out, in * bits / 32), scales (out, groups)."""

    name = "mlx"
    methods = ("metal",)
    searches_scales = True

    packing: Packing

    @classmethod
    def declared(cls, scan: CheckpointScan) -> bool:
        return super().declared(scan) or _settings(scan) is not None

    @classmethod
    def find(cls, scan: CheckpointScan) -> Iterator[QuantizedWeight]:
        settings = _settings(scan)
        if settings is None:
            return
        biases = BIASES[scan.method]
        for module, spec in scan.with_ending(".weight"):
            packing = _packing(scan, settings, module, spec)
            if packing is None:
                continue
            leaves = (".scales", biases) if packing.mode == AFFINE else (".scales",)
            siblings = scan.siblings(module, *leaves)
            if siblings is None or not _fits(scan, spec, siblings, packing):
                continue
            scan.check_finite(*siblings)
            yield cls.of(
                (spec, *siblings),
                key=spec.key,
                dtype=siblings[0].dtype if packing.mode == AFFINE else scan.compute_dtype,
                shape=(*spec.shape[:-1], spec.shape[-1] * WORD // packing.bits),
                packing=packing,
            )

    @classmethod
    def slots(
        cls, scan: CheckpointScan, weights: Sequence[QuantizedWeight]
    ) -> Mapping[str, tuple[Slot, ...]]:
        """Those of transformers' stacks of experts, of which mlx-lm stores gate and up apart, and
        of convolutions, whose channels mlx-lm stores last."""
        shapes = {spec.key: spec.shape for spec in (*weights, *scan.tensors.values())}
        deep = {key: shape for key, shape in shapes.items() if len(shape) == 3}
        model = scan.names.model if weights and deep else None
        if model is None:  # transformers does not know it
            return {}
        slots: dict[str, tuple[Slot, ...]] = {}
        for key, shape in deep.items():
            name = model.renamed(key)
            value, moved = model.state.get(name), (shape[0], shape[2], shape[1])
            if value is not None and value.shape == moved != shape and key in scan.tensors:
                first, second, third = identity_slot(key, shape).axes
                slots[name] = (Slot(key, shape, (first, third, second)),)
        stacks = dict.fromkeys(match.group(1, 2) for match in map(STACK.fullmatch, deep) if match)
        for parent, child in stacks:
            experts = model.renamed(f"{parent}.experts.down_proj").rpartition(".")[0]
            if scan.names.transposed_experts(experts):
                continue
            for name, stored in STACKS.items():
                keys = [f"{parent}.{child}.{one}.weight" for one in stored]
                value = model.state.get(f"{experts}.{name}")
                if value is not None and deep.keys() >= {*keys}:
                    joined = _below_each_other([(key, deep[key]) for key in keys])
                    if extent(joined) == value.shape:
                        slots[f"{experts}.{name}"] = joined
        return slots

    def decode(self, stored: Parts) -> Tensor:
        words, *scales = self._matrices(stored)
        if self.packing.mode == AFFINE:
            value = affine.decode_affine(affine.Affine(words, *scales), self.packing.bits)
        elif self.packing.mode == MXFP4:
            blocks = words.view(torch.uint8).unflatten(1, (-1, MX_GROUP // 2))
            value = fp4.decode_mxfp4(blocks, scales[0])
        elif self.packing.mode == NVFP4:
            scale = scales[0].view(torch.float8_e4m3fn)
            value = fp4.decode_nvfp4(words.view(torch.uint8), scale, _ones(scale))
        else:
            codes = words.view(torch.float8_e4m3fn)
            value = fp8.decode_fp8(codes, scales[0], (1, MX_GROUP))
        return value.view(self.shape)

    def encode(
        self, weight: Tensor, stored: Parts | None = None, draws: Draws | None = None
    ) -> Parts:
        """Encode; a group keeps its scale, or gets a new one by mlx's rule if that is nearer to
        W."""
        assert stored is not None
        words, *scales = self._matrices(stored)
        rows = weight.reshape(-1, self.shape[-1]).contiguous()
        if self.packing.mode == AFFINE:
            old = affine.Affine(words, *scales)
            return self.as_parts(*affine.requantize_affine(rows, old, self.packing.bits, draws))
        before, new = self._float_grid(scales[0]), self._new_scale(rows)
        after = self._float_grid(new)
        if draws is None:
            better = after.errors(rows, sampled=False) < before.errors(rows, sampled=False)
        else:
            better = loses_less(rows, before, after)
        scale = chosen(better, new, scales[0])
        return self.as_parts(self._codes(rows, scale, draws).view(words.dtype), scale)

    def grid(self, stored: Parts) -> Grid:
        _, *scales = self._matrices(stored)
        if self.packing.mode == AFFINE:
            scale, bias = scales
            return affine.affine_grid(scale, bias, self.packing.bits, self.packing.size)
        return self._float_grid(scales[0])

    @property
    def format(self) -> str:
        mode, bits, size = self.packing
        return f"{self.name} {bits} bits, groups of {size}" if mode == AFFINE else f"mlx {mode}"

    @property
    def rows_per_block(self) -> int | None:
        return 1

    @property
    def row_axes(self) -> dict[int, tuple[int, int, int]]:
        return dict.fromkeys(range(len(self.parts)), (0, 1, 1))

    def _matrices(self, stored: Parts) -> list[Tensor]:
        """Its parts as matrices, the rows of all experts below each other."""
        return [part.reshape(-1, part.shape[-1]) for part in self.values(stored)]

    def _float_grid(self, scale: Tensor) -> Grid:
        """The grid of a mode without biases."""
        if self.packing.mode == MXFP4:
            return fp4.mxfp4_grid(scale)
        if self.packing.mode == NVFP4:
            return fp4.nvfp4_grid(scale.view(torch.float8_e4m3fn), _ones(scale))
        shape = (len(scale), scale.shape[1] * MX_GROUP)
        (grid,) = fp8.grids(scale, shape, (1, MX_GROUP))
        return grid

    def _new_scale(self, rows: Tensor) -> Tensor:  # (rows, groups) uint8
        """The least scales with which nothing saturates, for nvfp4 the nearest ones."""
        if self.packing.mode == MXFP4:
            return fp4.encode_mxfp4(rows, rule="up").scale
        if self.packing.mode == NVFP4:
            return fp4.encode_nvfp4(rows, _ones(rows)).scale.view(torch.uint8)
        exponents = torch.float8_e8m0fnu
        scale = fp8.encode_fp8(rows, (1, MX_GROUP), rule="power", scale_dtype=exponents).scale
        return scale.view(torch.uint8)

    def _codes(self, rows: Tensor, scale: Tensor, draws: Draws | None) -> Tensor:
        """The codes with these scales, in bytes."""
        if self.packing.mode == MXFP4:
            return fp4.encode_mxfp4(rows, scale, draws=draws).codes.flatten(1)
        if self.packing.mode == NVFP4:
            scale = scale.view(torch.float8_e4m3fn)
            return fp4.encode_nvfp4(rows, _ones(scale), scale, draws).codes
        return fp8.encode_fp8(rows, (1, MX_GROUP), scale, draws=draws).codes


def _ones(like: Tensor) -> fp4.TensorScale:
    """The scale of all groups, which mlx's nvfp4 does not have."""
    return fp4.TensorScale(torch.ones((), device=like.device), divides=False)


def _below_each_other(stacks: list[tuple[str, tuple[int, ...]]]) -> tuple[Slot, ...]:
    """The slots of a stack whose rows are those of stored ones, one after the other."""
    slots, at = [], 0
    for key, shape in stacks:
        first, rows, columns = identity_slot(key, shape).axes
        slots.append(Slot(key, shape, (first, replace(rows, at=at), columns)))
        at += shape[1]
    return tuple(slots)


def _settings(scan: CheckpointScan) -> Json | None:
    """The config's settings of the whole model and of modules by path; None if the config declares
    another format."""
    if scan.method == "metal":
        return scan.settings
    settings = scan.base.config.get("quantization")
    return settings if isinstance(settings, dict) and not scan.method else None


def _packing(scan: CheckpointScan, settings: Json, module: str, spec: TensorSpec) -> Packing | None:
    """The packing of a module's weight; None for floats, and with an error for others than mlx's
    and for weights that contradict the config."""
    own: Any = settings.get(module, settings)
    is_packed, own = spec.dtype == "U32", settings if own is True else own
    if module in settings and is_packed != isinstance(own, dict):
        problem = f"stored as {spec.dtype}, and the config's setting is {shown(settings[module])}"
        scan.check(spec.key, False, problem, "U32 for modules with settings, floats for false")
        return None
    if not is_packed:
        return None
    packing = Packing.of(own)
    names = ("mode", "bits", "group_size")
    said = ", ".join(f"{name} {shown(own[name])}" for name in names if name in own)
    if packing is None:
        expected = "affine of 2, 3, 4, 5, 6 or 8 bits in groups of 32, 64 or 128, mxfp4, nvfp4 of "
        expected += "16, or mxfp8"
        scan.errors.add(f"{shown(spec.key)}: MLX's {said}", expected, code="AK404")
    elif f"{module}.global_scale" in scan.tensors:
        problem = f"{shown(module)}.global_scale, a scale of the whole matrix"
        scan.errors.add(problem, "nvfp4 without it", code="AK404")
        return None
    return packing


def _fits(
    scan: CheckpointScan, codes: TensorSpec, scales: list[TensorSpec], packing: Packing
) -> bool:
    """Return whether the words have a code for each column, and each group has its scales."""
    width, rest = divmod(codes.shape[-1] * WORD, packing.bits)
    fits = len(codes.shape) in (2, 3) and 0 not in codes.shape and rest == 0
    shape = (*codes.shape[:-1], width / packing.size)
    types = ("F16", "BF16", "F32") if packing.mode == AFFINE else ("U8",)
    fits = fits and all(one.shape == shape and one.dtype in types for one in scales)
    fits = fits and len({one.dtype for one in scales}) == 1
    specs = (f"{one.key.rpartition('.')[2]} {one.dtype} {one.shape}" for one in (codes, *scales))
    mode, bits, size = packing
    expected = f"words of {bits} bits, and {mode} scales for each {size} columns"
    return scan.check(codes.key, fits, ", ".join(specs), expected)

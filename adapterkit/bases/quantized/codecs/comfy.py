"""comfyui: the quantized layers of ComfyUI's single-file models: FP8 with a scale, MXFP8, NVFP4 and
int8.

Each layer's JSON tensor (`comfy_quant`) or the header's `_quantization_metadata` gives its format;
older files use names (`scale_weight`, `scaled_fp8`). Source: ComfyUI's QUANTIZATION.md,
comfy/quant_ops.py and comfy/ops.py; comfy-kitchen.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass

from adapterkit.core import dtypes
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.checkpoint.strict import nested_json
from adapterkit.core.errors import listed, shown
from adapterkit.core.lazy import Tensor, torch
from adapterkit.core.records import Json
from adapterkit.core.weights.codec import Parts, PlainWeight, QuantizedWeight
from adapterkit.core.weights.decoded import CheckpointScan
from adapterkit.kernels.quant import fp4, fp8, integers
from adapterkit.kernels.quant.grid import NV_GROUP, Grid
from adapterkit.kernels.quant.stochastic import Draws

METADATA = "_quantization_metadata"
CONFIG, MARKER, SCALE_WEIGHT = "comfy_quant", "scaled_fp8", "scale_weight"
INPUT_SCALES = ("input_scale", "scale_input", CONFIG)
E4M3, E5M2, MXFP8, NVFP4, INT8 = KINDS = (
    "float8_e4m3fn", "float8_e5m2", "mxfp8", "nvfp4", "int8_tensorwise",
)  # fmt: skip
CODES = {E4M3: "F8_E4M3", E5M2: "F8_E5M2", MXFP8: "F8_E4M3", NVFP4: "U8", INT8: "I8"}
TILES = {MXFP8: ("F8_E8M0", "U8"), NVFP4: ("F8_E4M3", "U8")}  # dtypes of scales in tiles
GROUPS = {MXFP8: 32, NVFP4: NV_GROUP}  # values with one scale
MULTIPLES = {MXFP8: 32, NVFP4: 16}  # of rows and columns; others are padded
IMAGE_KINDS = {"comfy-fp8": E4M3, "comfy-mxfp8": MXFP8, "comfy-nvfp4": NVFP4, "comfy-int8": INT8}
LEAST = 1e-30  # scale of int8
ROWS, COLUMNS = 128, 4  # of a tile of scales


@dataclass(frozen=True, kw_only=True)
class Comfy(QuantizedWeight):
    """W = code * scale: one scale for all (FP8, int8) or for a row (int8), a power of 2 for 32
    values (MXFP8), scale * weight_scale_2 for 16 values (NVFP4)."""

    name = "comfyui"
    methods = ()
    image_targets = ("comfy-fp8", "comfy-mxfp8", "comfy-nvfp4", "comfy-int8")

    kind: str
    settings: str = ""  # the JSON that is written for a new weight

    @classmethod
    def for_encoding(cls, target: str, weight: PlainWeight, options: Json) -> Comfy | None:
        kind, (out, width) = IMAGE_KINDS[target], weight.shape
        if not weight.has_weight_name or any(n % MULTIPLES.get(kind, 1) for n in weight.shape):
            return None
        settings = json.dumps({"format": kind})
        packed = (out, width // 2) if kind == NVFP4 else weight.shape
        shape: tuple[int, ...] = (out, 1) if kind == INT8 else ()
        if kind in GROUPS:
            shape = tiled_shape(out, width // GROUPS[kind])
        parts = [
            weight.part("", CODES[kind], packed),
            weight.part("_scale", TILES.get(kind, ("F32",))[0], shape),
            *([weight.part("_scale_2", "F32", ())] if kind == NVFP4 else []),
            weight.sibling(CONFIG, "U8", (len(settings),)),
        ]
        return cls.encoding(weight, parts, kind=kind, settings=settings)

    @classmethod
    def find(cls, scan: CheckpointScan) -> Iterator[QuantizedWeight]:
        if scan.method:
            return
        layers = StoredLayers(scan)
        for module, kind in layers.kinds().items():
            parts = layers.parts(module, kind)
            if parts is not None:
                out, *rest = parts[0].shape
                shape = (out, 2 * rest[0]) if kind == NVFP4 else parts[0].shape
                own = {"key": f"{module}.weight", "dtype": scan.compute_dtype, "shape": shape}
                yield cls.of(parts, **own, kind=kind)

    def contradiction(self, stored: Parts) -> tuple[str, str] | None:
        declared = stored.get(self.key.removesuffix("weight") + CONFIG)
        kind = self.kind if declared is None else _declared_kind(bytes(declared.tolist()))
        return None if kind == self.kind else (f"{shown(self.key)}: {kind}", self.kind)

    def decode(self, stored: Parts) -> Tensor:
        codes, scale, *_ = self.values(stored)
        if self.kind == NVFP4:
            return fp4.decode_nvfp4(_swapped(codes), *self._nvfp4(stored))
        if self.kind == INT8:
            return integers.decode_int8(codes, scale)
        value = fp8.decode_fp8(codes.view(self.matrix_shape), self._scales(stored), self._block)
        return value.view(self.shape)

    def encode(
        self, weight: Tensor, stored: Parts | None = None, draws: Draws | None = None
    ) -> Parts:
        """Encode; int8 keeps the old scale if it is nearer to W than a new one, and NVFP4 keeps
        weight_scale_2 while the largest value fits."""
        parts = self._encode(weight.reshape(self.matrix_shape), stored, draws)
        if self.settings and stored is None:
            text = bytearray(self.settings.encode())
            parts[self.parts[-1].key] = torch.frombuffer(text, dtype=torch.uint8)
        return parts

    def grid(self, stored: Parts) -> Grid:
        if self.kind == NVFP4:
            return fp4.nvfp4_grid(*self._nvfp4(stored))
        if self.kind == INT8:
            return integers.grid_of(self.values(stored)[1], None, self.matrix_shape)
        scale = self._scales(stored)
        (grid,) = fp8.grids(scale, self.matrix_shape, self._block, dtype=self.code_dtype)
        return grid

    @property
    def _block(self) -> tuple[int, int]:
        """The rows and columns of the matrix with one scale."""
        if self.kind in GROUPS:
            return (1, GROUPS[self.kind])
        out, width = self.matrix_shape
        return (out if math.prod(self.parts[1].shape) == 1 else 1, width)

    def _in_rows(self, stored: Parts) -> Tensor:
        """The bytes of its scales, row by row."""
        out, width = self.shape
        return untiled(stored[self.parts[1].key].view(torch.uint8), out, width // self._block[1])

    def _scales(self, stored: Parts) -> Tensor:
        """The scales of FP8, one row for each row of blocks."""
        if self.kind == MXFP8:
            return self._in_rows(stored)
        return self.values(stored)[1].reshape(-1, 1)

    def _in_tiles(self, scale: Tensor, stored: Parts | None) -> Tensor:
        key, dtype = self.parts[1].key, dtypes.torch_dtype(self.parts[1].dtype)
        old = stored[key].view(torch.uint8) if stored else None
        return tiled(scale.view(torch.uint8), old).view(dtype)

    def _nvfp4(self, stored: Parts) -> tuple[Tensor, fp4.TensorScale]:
        factor = fp4.TensorScale(stored[self.parts[2].key], divides=False)
        return self._in_rows(stored).view(torch.float8_e4m3fn), factor

    def _encode(self, matrix: Tensor, stored: Parts | None, draws: Draws | None) -> Parts:
        dtype = dtypes.torch_dtype(self.parts[1].dtype)
        if self.kind == NVFP4:
            old = self._nvfp4(stored) if stored else None
            result = fp4.renew_nvfp4(matrix, old, draws, divides=False)
            scale = self._in_tiles(result.scale, stored)
            return self.as_parts(_swapped(result.codes), scale, result.tensor_scale.value)
        if self.kind == INT8:
            return self._integers(matrix, stored, draws)
        old, block = self._scales(stored) if stored else None, self._block
        if self.kind == MXFP8:
            how = {"rule": "power", "new_dtype": torch.float8_e8m0fnu}
            codes, scale = fp8.requantize_fp8(matrix, block, old, draws, **how)
            return self.as_parts(codes, self._in_tiles(scale, stored))
        how = {"dtype": self.code_dtype, "new_dtype": dtype}
        return self.as_parts(*fp8.requantize_fp8(matrix, block, old, draws, **how))

    def _integers(self, matrix: Tensor, stored: Parts | None, draws: Draws | None) -> Parts:
        """Integers, as a single row if they share one scale."""
        scale, dtype = self.parts[1], dtypes.torch_dtype(self.parts[1].dtype)
        lines = matrix.reshape(1, -1) if math.prod(scale.shape) == 1 else matrix

        def new_scale(w: Tensor) -> tuple[Tensor, None]:
            return (w.abs().amax(1, keepdim=True) / 127).clamp_(min=LEAST).to(dtype), None

        old = stored[scale.key].reshape(-1, 1) if stored else None
        result = integers.requantize_integers(lines, 8, old, None, None, new_scale, draws)
        return self.as_parts(result.codes, result.scale)


@dataclass(frozen=True)
class StoredLayers:
    """The quantized layers of a file: their declared formats and their tensors."""

    scan: CheckpointScan

    def kinds(self) -> dict[str, str]:
        """The format of each layer, by module; unknown ones are errors."""
        kinds: dict[str, str] = {}
        others: dict[str, list[str]] = {}
        for module, declared in self._declared().items():
            kind = _kind(declared)
            if kind in KINDS:
                kinds[module] = kind
            else:
                others.setdefault(kind, []).append(module)
        for kind, modules in others.items():
            hint = "use the file in 16 bits, or in one of these formats"
            problem = f"{listed(modules)}: ComfyUI's format {shown(kind)}"
            self.scan.errors.add(problem, ", ".join(KINDS), hint, code="AK404")
        return kinds

    def _declared(self) -> dict[str, Json]:
        scan, declared = self.scan, dict[str, Json]()
        for header in scan.base.shards.values():
            declared |= self._of_header(header.metadata.get(METADATA))
        for module, spec in () if declared else scan.with_ending(f".{SCALE_WEIGHT}"):
            codes = scan.tensors.get(f"{module}.weight", spec)
            declared[module] = {"format": E5M2 if codes.dtype == CODES[E5M2] else E4M3}
        next_to = scan.with_ending(f".{CONFIG}")
        scan.fetch(spec for _, spec in next_to)
        for module, spec in next_to:
            declared[module] = scan.read_json(spec, scan.present(f"{module}.", ("weight",)))
        return declared

    def _of_header(self, text: str | None) -> dict[str, Json]:
        """The layers that the header names, with or without the prefix of its keys."""
        try:
            layers = nested_json(text or "{}").get("layers", {}).items()
        except (ValueError, AttributeError):
            problem = f"{METADATA} {shown(text)}"
            self.scan.errors.add(problem, 'JSON: {"layers": {NAME: {"format": ...}}}', code="AK404")
            return {}
        ends: dict[str, list[str]] = {}
        for module, _ in self.scan.with_ending(".weight_scale"):
            words = module.split(".")
            for first in range(len(words)):
                ends.setdefault(".".join(words[first:]), []).append(module)
        declared: dict[str, Json] = {}
        for name, each in layers:
            own = {"format": each} if isinstance(each, str) else each
            modules = [name] if name in ends.get(name, ()) else ends.get(name, [])
            declared |= {module: own if isinstance(own, dict) else {} for module in modules}
        return declared

    def parts(self, module: str, kind: str) -> tuple[TensorSpec, ...] | None:
        """The tensors of a layer; None, with an error, if they do not fit its format."""
        scan, codes = self.scan, self.scan.tensors.get(f"{module}.weight")
        if codes is None or scan.is_scaled_for_inputs(f"{module}.pre_quant_scale"):
            return None
        is_old = f"{module}.{SCALE_WEIGHT}" in scan.tensors
        names = (SCALE_WEIGHT,) if is_old else ("weight_scale", "weight_scale_2")
        siblings = scan.siblings(module, *(f".{name}" for name in names[: 1 + (kind == NVFP4)]))
        if siblings is None or not self._fits(kind, codes, *siblings):
            return None
        bias = scan.tensors.get(f"{module}.bias", codes)
        problem = f"{codes.shape[0]} rows, {bias.shape[0] if bias.shape else 0} in its bias"
        if not scan.check(codes.key, bias.shape[:1] == codes.shape[:1], problem, "no padded rows"):
            return None
        markers = (key for key in scan.tensors if f".{key}".endswith(f".{MARKER}"))
        marker = next((key for key in markers if module.startswith(key[: -len(MARKER)])), None)
        mine = () if marker is None else (scan.tensors.pop(marker),)
        return (codes, *siblings, *scan.present(f"{module}.", INPUT_SCALES), *mine)

    def _fits(self, kind: str, codes: TensorSpec, scale: TensorSpec, *factor: TensorSpec) -> bool:
        """Return whether shapes and dtypes fit; an error is noted otherwise."""
        shape, out = codes.shape, codes.shape[0] if codes.shape else 0
        fits = codes.dtype == CODES[kind] and 0 not in shape and len(shape) >= 2
        fits = fits and (len(shape) == 2 or kind in (E4M3, E5M2))
        expected = f"{CODES[kind]} codes, and one scale or one for each row"
        if kind in GROUPS:
            width = shape[-1] * (2 if kind == NVFP4 else 1) if shape else 0
            tiles = tiled_shape(out, width // GROUPS[kind])
            expected = f"{CODES[kind]} codes, scales {tiles} in tiles"
            fits = fits and width % GROUPS[kind] == 0 and scale.dtype in TILES[kind]
            fits = fits and scale.shape == tiles
            fits = fits and all(one.dtype == "F32" and math.prod(one.shape) == 1 for one in factor)
        else:
            fits = fits and scale.dtype in dtypes.FLOATS
            fits = fits and scale.shape in ((), (1,), (1, 1), (out, *[1] * (len(shape) - 1)))
        problem = ", ".join(f"{spec.dtype} {spec.shape}" for spec in (codes, scale, *factor))
        if not self.scan.check(codes.key, fits, f"{kind}: {problem}", expected):
            return False
        self.scan.check_finite(scale)
        self.scan.check_finite(*factor, positive=True)
        return True


def _declared_kind(text: bytes) -> str:
    """`_kind` of a layer's own text; the text if it is no JSON object."""
    try:
        return _kind(nested_json(text))
    except (ValueError, AttributeError):
        return shown(text)


def _kind(declared: Json) -> str:
    """The format of a layer, with its other settings that affect values."""
    more = declared.get("params")
    more = declared | more if isinstance(more, dict) else declared
    return f"{declared.get('format')}{' with convrot' if more.get('convrot') else ''}"


def _swapped(codes: Tensor) -> Tensor:
    """Pairs of FP4 values exchanged, because comfy-kitchen stores the first in the high half."""
    return codes << 4 | codes >> 4


# Scales of blocks are in cuBLAS's order: tiles of 128 rows and 4 columns, in which row 32·i + j is
# the (4·j + i)-th (https://docs.nvidia.com/cuda/cublas, "1D Block Scaling Factors Layout").


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

"""bnb8: bitsandbytes' LLM.int8 weights, rows of int8 with a scale each."""

from collections.abc import Iterator
from dataclasses import dataclass

from adapterkit.bases.quantized.codecs.bnb4 import bitsandbytes_config, naming
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.errors import shown
from adapterkit.core.lazy import Tensor, torch
from adapterkit.core.records import Json
from adapterkit.core.weights.codec import Parts, PlainWeight, QuantizedModules, QuantizedWeight
from adapterkit.core.weights.decoded import CheckpointScan
from adapterkit.kernels.quant import llm_int8 as int8_rows
from adapterkit.kernels.quant.grid import Grid
from adapterkit.kernels.quant.stochastic import Draws

ROWS = 0  # weight_format: the layout "row"


@dataclass(frozen=True, kw_only=True)
class Bnb8(QuantizedWeight):
    """W = code * SCB / 127, one SCB for each output row."""

    name = "bnb8"
    tier = "core"
    methods = ("bitsandbytes",)
    targets = ("int8",)

    @classmethod
    def for_encoding(cls, target: str, weight: PlainWeight, options: Json) -> "Bnb8 | None":
        if not weight.has_weight_name:
            return None
        parts = (
            weight.part("", "I8", weight.shape),
            weight.sibling("SCB", "F32", weight.shape[:1]),
            weight.sibling("weight_format", "U8", ()),
        )
        shape, transposed = weight.model_shape, weight.transposed
        return cls.encoding(weight, parts, shape=shape, transposed=transposed)

    @classmethod
    def config(cls, modules: QuantizedModules) -> Json:
        return bitsandbytes_config({"load_in_8bit": True}, modules.skipped)

    @classmethod
    def find(cls, scan: CheckpointScan) -> Iterator[QuantizedWeight]:
        if scan.reads_freely:
            scan.fetch(spec for _, spec in scan.with_ending(".weight_format"))
        for module, scale in scan.with_ending(".SCB"):
            siblings = scan.siblings(module, ".weight", ".SCB")
            if siblings is None:
                continue
            codes, layout = siblings[0], scan.tensors.get(f"{module}.weight_format")
            if not _fits(scan, codes, scale, layout):
                continue
            scan.check_finite(scale)
            transposed = scan.names.transposed(module)
            yield cls.of(
                (codes, scale, *([layout] if layout else ())),
                key=codes.key,
                dtype=scan.compute_dtype,
                shape=codes.shape[::-1] if transposed else codes.shape,
                transposed=transposed,
            )

    def contradiction(self, stored: Parts) -> tuple[str, str] | None:
        layout = next((stored[part.key] for part in self.parts[2:]), None)
        if layout is None or int(layout) == ROWS:
            return None
        return f"{shown(self.key)}: format {int(layout)}", f"format {ROWS}"

    def decode(self, stored: Parts) -> Tensor:
        return self.out_in(int8_rows.decode_int8(*self.values(stored)[:2]))

    def encode(
        self, weight: Tensor, stored: Parts | None = None, draws: Draws | None = None
    ) -> Parts:
        with naming(self.key):
            old = self.stored_scale(stored)
            result = int8_rows.requantize_int8(self.out_in(weight), old, draws)
        layouts = {part.key: torch.zeros(part.shape, dtype=torch.uint8) for part in self.parts[2:]}
        return self.as_parts(*result) | layouts

    def grid(self, stored: Parts) -> Grid:
        codes, scale, *_ = self.values(stored)
        return int8_rows.grid_of(scale, codes.shape[1])

    @property
    def rows_per_block(self) -> int | None:
        return None if self.transposed else 1

    @property
    def row_axes(self) -> dict[int, tuple[int, int, int]]:
        return dict.fromkeys((0, 1), (0, 1, 1))


def _fits(
    scan: CheckpointScan, codes: TensorSpec, scale: TensorSpec, layout: TensorSpec | None
) -> bool:
    fits = codes.dtype == "I8" and len(codes.shape) == 2
    fits = fits and scale.dtype == "F32" and scale.shape == codes.shape[:1]
    problem = f"{codes.dtype} {codes.shape}, SCB {scale.dtype} {scale.shape}"
    if layout is not None:
        byte = layout.dtype == "U8" and layout.nbytes == 1
        fits = fits and byte
        if fits and scan.reads_freely:
            stored = int(scan.read(layout, ()))
            fits = stored == ROWS
            problem += f", format {stored}"
    return scan.check(codes.key, fits, problem, "I8 rows, an F32 scale for each, format 0")

"""bnb8: bitsandbytes' LLM.int8 weights: rows of int8 with `SCB`, their largest magnitudes."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adapterkit.kernels import vectorwise
from adapterkit.kernels.stochastic import Draws
from adapterkit.weights.codec import CheckpointScan, PlainWeight, QuantizedModules, QuantizedWeight
from adapterkit.weights.codecs.bnb4 import config, named

ROWS = 0  # weight_format: the layout "row"


@dataclass(frozen=True, kw_only=True)
class Bnb8(QuantizedWeight):
    """W = code * SCB / 127, one SCB for each output row."""

    name = "bnb8"
    methods = ("bitsandbytes",)
    targets = ("int8",)

    transposed: bool = False  # the model keeps it (in, out), as GPT-2 does

    @classmethod
    def for_encoding(
        cls, target: str, weight: PlainWeight, options: dict[str, Any]
    ) -> "Bnb8 | None":
        if not weight.has_weight_name:
            return None
        codes = weight.part("", "I8", weight.shape)
        parts = (
            codes,
            weight.sibling("SCB", "F32", weight.shape[:1]),
            weight.sibling("weight_format", "U8", ()),
        )
        shape = weight.shape[::-1] if weight.transposed else weight.shape
        place = {"file": "", "start": 0, "stop": codes.nbytes}
        return cls(
            key=weight.key,
            dtype=weight.dtype,
            shape=shape,
            parts=parts,
            transposed=weight.transposed,
            **place,
        )

    @classmethod
    def config(cls, choice: QuantizedModules) -> dict[str, Any]:
        return config({"load_in_8bit": True}, choice.skipped)

    @classmethod
    def find(cls, found: CheckpointScan) -> Iterator[QuantizedWeight]:
        found.fetch(spec for key, spec in found.tensors.items() if key.endswith(".weight_format"))
        for key, scale in list(found.tensors.items()):
            module, mark, _ = key.rpartition(".SCB")
            if not mark or not key.endswith(".SCB"):
                continue
            parts = found.siblings(module, ".weight", ".SCB")
            if parts is None:
                continue
            codes, form = parts[0], found.tensors.get(f"{module}.weight_format")
            fits = (
                codes.dtype == "I8"
                and len(codes.shape) == 2
                and scale.dtype == "F32"
                and scale.shape == codes.shape[:1]
            )
            fits = fits and (
                form is None
                or (form.dtype == "U8" and form.nbytes == 1 and int(found.read(form)) == ROWS)
            )
            text = f"{codes.dtype} {codes.shape}, SCB {scale.dtype} {scale.shape}" + (
                f", format {found.read(form)}" if form else ""
            )
            if not found.check(codes.key, fits, text, "I8 rows, an F32 scale for each, format 0"):
                continue
            found.check_finite(scale)
            turned = found.transposed(module)
            shape = codes.shape[::-1] if turned else codes.shape
            place = {
                "file": codes.file,
                "start": codes.start,
                "stop": codes.stop,
                "folder": codes.folder,
            }
            parts = (codes, scale, *([form] if form else ()))
            yield cls(
                key=codes.key,
                dtype=found.compute_dtype,
                shape=shape,
                parts=parts,
                transposed=turned,
                **place,
            )

    def decode(self, stored: dict[str, Tensor]) -> Tensor:
        weight = vectorwise.decode_int8(stored[self.parts[0].key], stored[self.parts[1].key])
        return weight.T.contiguous() if self.transposed else weight

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        with named(self.key):
            codes, scale = vectorwise.quantize_int8(
                (weight.T if self.transposed else weight).contiguous()
            )
        made = {self.parts[0].key: codes, self.parts[1].key: scale}
        return made | {
            part.key: torch.zeros(part.shape, dtype=torch.uint8) for part in self.parts[2:]
        }

    def encode_drawn(
        self, stored: dict[str, Tensor], weight: Tensor, draws: Draws
    ) -> dict[str, Tensor]:
        codes, scale = (part.key for part in self.parts[:2])
        with named(self.key):
            made = vectorwise.requantize_int8(
                (weight.T if self.transposed else weight).contiguous(), stored[scale], draws
            )
        return {codes: made.codes, scale: made.scale}

    @property
    def rows_per_block(self) -> int | None:
        return None if self.transposed else 1

    def row_views(
        self, stored: dict[str, Tensor], matrix: int, first: int, last: int
    ) -> dict[str, Tensor]:
        return {part.key: stored[part.key][first:last] for part in self.parts[:2]}

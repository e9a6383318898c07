"""Decode tensors of adapters in 8 bits to float32: fp8 casts, and fp8 or int8 codes with a scale
for the tensor or for each of its rows.

Sources: https://github.com/NVIDIA/TensorRT-LLM/pull/16810 (casts to E4M3) and
https://github.com/silveroxides/convert_to_quant (scales, for ComfyUI).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.dtypes import FLOATS

if TYPE_CHECKING:
    from torch import Tensor

CASTS = ("F8_E4M3", "F8_E5M2")
CODES = (*CASTS, "I8")
SCALES = ("scale_weight", "weight_scale")  # last words of a scale's key, instead of `weight`


@dataclass(frozen=True, slots=True)
class EightBits(TensorSpec):
    """A tensor of codes: its shape, and the `F32` that decodes it."""

    parts: tuple[TensorSpec, ...] = ()  # the codes, and their scale if there is one

    def narrowed(self, shape: tuple[int, ...], first: int, last: int) -> "EightBits":
        codes, *scales = self.parts
        own = codes.narrowed(shape, first, last)
        count = math.prod(scales[0].shape) if scales else 1
        if count > 1:  # one for each entry of the first axis
            assert shape[0] == count
            scales = [scales[0].narrowed((count,), first, last)]
        return replace(self, shape=own.shape, start=own.start, stop=own.stop, parts=(own, *scales))

    def decode(self, codes: "Tensor", scale: "Tensor | None" = None) -> "Tensor":
        """code · scale, rounded once."""
        values = codes.float().view(self.shape)
        if scale is None:
            return values
        rows = scale.double().view(-1, *[1] * max(values.dim() - 1, 0))
        return (values * rows).float().view(self.shape)


def decoded(tensors: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """The tensors of a file, with codes in 8 bits decoded to floats and their scales removed. int8
    without a scale, and codes whose scales do not fit, stay for the file's reader to refuse."""
    found, used = dict(tensors), set[str]()
    for key, spec in tensors.items():
        names = (f"{key.removesuffix('weight')}{name}" for name in SCALES)
        scales = [tensors[name] for name in names if key.endswith(".weight") and name in tensors]
        fits = len(scales) == 1 and _fits(spec, scales[0])
        if spec.dtype in (CODES if fits else CASTS) and (fits or not scales):
            used |= {scale.key for scale in scales}
            place = (key, "F32", spec.shape, spec.file, spec.start, spec.stop, spec.folder)
            found[key] = EightBits(*place, parts=(spec, *scales))
    return {key: spec for key, spec in found.items() if key not in used}


def _fits(codes: TensorSpec, scale: TensorSpec) -> bool:
    """True if a scale is one number, or one for each entry of the first axis."""
    rows = codes.shape[:1]
    of_rows = bool(rows) and scale.shape in (rows, (*rows, *[1] * (len(codes.shape) - 1)))
    return scale.dtype in FLOATS and (math.prod(scale.shape) == 1 or of_rows)


def notes_on(tensors: Mapping[str, TensorSpec]) -> list[str]:
    """A note on decoded tensors, if there are any."""
    own = [spec for spec in tensors.values() if isinstance(spec, EightBits)]
    kinds = sorted({spec.parts[0].dtype for spec in own})
    if not own:
        return []
    return [f"{len(own)} tensors are {'/'.join(kinds)}, read as the float32 that they decode to"]

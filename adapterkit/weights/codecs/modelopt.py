"""modelopt: NVIDIA's NVFP4 and FP8 checkpoints, as vLLM and TensorRT-LLM read them; told by config.json or hf_quant_config.json."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from adapterkit.checkpoint.header import TensorSpec
from adapterkit.checkpoint.strict import read_json
from adapterkit.errors import shown
from adapterkit.kernels import fp4, fp8
from adapterkit.kernels.common import block_amax
from adapterkit.kernels.stochastic import Draws
from adapterkit.weights.codec import CheckpointScan, QuantizedWeight

FILE = "hf_quant_config.json"
CODES = {"NVFP4": "U8", "FP8": "F8_E4M3"}
BESIDE = ("input_scale", "k_scale", "v_scale", "output_scale")


@dataclass(frozen=True, kw_only=True)
class Modelopt(QuantizedWeight):
    """NVFP4: W = code * (scale * weight_scale_2), a scale for 16 values and one for all. FP8: W = code * scale, one for all."""

    name = "modelopt"
    methods = ("modelopt",)
    files = (FILE,)

    @classmethod
    def find(cls, found: CheckpointScan) -> Iterator[QuantizedWeight]:
        algorithm = _algorithm(found) if found.has_keys(".weight_scale") else None
        if algorithm is None:
            return
        for key, spec in list(found.tensors.items()):
            if not key.endswith(".weight") or spec.dtype != CODES[algorithm]:
                continue
            siblings = found.siblings(
                key, *(("_scale", "_scale_2") if algorithm == "NVFP4" else ("_scale",))
            )
            if siblings is None or not _fits(found, key, spec, siblings):
                continue
            start = key.removesuffix("weight")
            if start + "pre_quant_scale" in found.tensors:
                found.refuse(
                    f"{shown(start)}pre_quant_scale: a weight scaled for its inputs",
                    "weights as the model has them",
                )
                continue
            beside = [
                found.tensors[start + name] for name in BESIDE if start + name in found.tensors
            ]
            shape = (spec.shape[0], spec.shape[1] * (2 if algorithm == "NVFP4" else 1))
            dtype, parts = found.compute_dtype, (spec, *siblings, *beside)
            place = {
                "file": spec.file,
                "start": spec.start,
                "stop": spec.stop,
                "folder": spec.folder,
            }
            yield cls(key=key, dtype=dtype, shape=shape, parts=parts, **place)

    def decode(self, stored: dict[str, Tensor]) -> Tensor:
        codes, scale = (stored[part.key] for part in self.parts[:2])
        if self.parts[0].dtype == "U8":
            return fp4.decode_nvfp4(codes, scale, factor=stored[self.key + "_scale_2"])
        return fp8.decode_fp8(codes, scale, self._block)

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        return self._made(weight, {}, None)

    def encode_keeping_scales(
        self, stored: dict[str, Tensor], weight: Tensor, draws: Draws | None = None
    ) -> dict[str, Tensor]:
        """The whole weight's factor, which fused layers share, stays as long as the largest value allows."""
        return stored | self._made(weight, stored, draws)

    @property
    def _block(self) -> tuple[int, int]:
        return (self.shape[0], self.shape[1])

    def _made(
        self, weight: Tensor, stored: dict[str, Tensor], draws: Draws | None
    ) -> dict[str, Tensor]:
        codes, scale = self.parts[:2]
        if codes.dtype != "U8":
            if draws is not None:
                made = fp8.requantize_fp8(weight, self._block, stored[scale.key], draws)
            else:
                made = fp8.encode_fp8(weight, self._block)
            return {codes.key: made.codes, scale.key: made.scale.view(scale.shape)}
        whole = self.parts[2]
        if draws is not None:
            renewed = fp4.requantize_nvfp4(
                weight, stored[scale.key], draws, factor=stored[whole.key]
            )
            return {
                codes.key: renewed.codes,
                scale.key: renewed.scale,
                whole.key: renewed.tensor_scale,
            }
        factor, largest = stored.get(whole.key), block_amax(weight, self._block)
        if factor is None or float(largest) > fp4.FP4_MAX * fp8.FP8_MAX * float(factor) * (
            1 + 2.0**-20
        ):
            factor = fp4.nvfp4_factor(largest)
        made = fp4.encode_nvfp4(weight, factor=factor)
        return {codes.key: made.codes, scale.key: made.scale, whole.key: factor.view(whole.shape)}


def _algorithm(found: CheckpointScan) -> str | None:
    """The layout that the configs agree on; None, with errors where it is not known."""
    said: list[object] = []
    if found.method == "modelopt":
        said.append(found.settings.get("quant_algo"))
    if FILE in found.base.files and found.method in ("modelopt", ""):
        config = read_json(found.base.folder, FILE)
        producer, settings = config.get("producer"), config.get("quantization")
        if (
            isinstance(producer, dict)
            and producer.get("name") == "modelopt"
            and isinstance(settings, dict)
        ):
            said.append(settings.get("quant_algo"))
    if not said:
        return None
    different = list(dict.fromkeys(map(shown, said)))
    if len(different) > 1:
        found.check(
            "quantization_config",
            False,
            f"quant_algo {' and '.join(different)}",
            "one, the same in both files",
        )
    elif different[0] not in CODES:
        found.refuse(f"modelopt's quant_algo {different[0]}", " or ".join(CODES))
    return different[0] if different[0] in CODES and len(different) == 1 else None


def _fits(found: CheckpointScan, key: str, codes: TensorSpec, siblings: list[TensorSpec]) -> bool:
    """Shapes and dtypes, and values of the scales."""
    scale, *whole = siblings
    shape = codes.shape
    good = (
        len(shape) == 2
        and 0 not in shape
        and all(spec.dtype == "F32" and math.prod(spec.shape) == 1 for spec in whole)
    )
    if codes.dtype == "U8":
        expected = "F8_E4M3 scales, one for 16 values, and one F32 for all"
        good = good and 2 * shape[1] % fp4.NV_GROUP == 0
        good = (
            good
            and scale.dtype == "F8_E4M3"
            and scale.shape == (shape[0], 2 * shape[1] // fp4.NV_GROUP)
        )
    else:
        expected = "one F32 scale"
        good = good and scale.dtype == "F32" and math.prod(scale.shape) == 1
    text = ", ".join(f"{spec.dtype} {spec.shape}" for spec in (codes, *siblings))
    if not found.check(key, good, text, expected):
        return False
    found.check_finite(scale)
    found.check_finite(*whole, positive=True)
    return True

"""modelopt: NVIDIA's NVFP4 and FP8 checkpoints, as vLLM and TensorRT-LLM read them, by config.json
or hf_quant_config.json."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.checkpoint.strict import read_json
from adapterkit.core.errors import shown
from adapterkit.core.lazy import Tensor
from adapterkit.core.weights.codec import Parts, QuantizedWeight
from adapterkit.core.weights.decoded import CheckpointScan
from adapterkit.kernels.quant import fp4, fp8
from adapterkit.kernels.quant.grid import NV_GROUP, Grid
from adapterkit.kernels.quant.stochastic import Draws

FILE = "hf_quant_config.json"
CODES = {"NVFP4": "U8", "FP8": "F8_E4M3"}
SCALES = {"NVFP4": ("_scale", "_scale_2"), "FP8": ("_scale",)}
ACTIVATION_SCALES = ("input_scale", "k_scale", "v_scale", "output_scale")


@dataclass(frozen=True, kw_only=True)
class Modelopt(QuantizedWeight):
    """NVFP4: W = code * (scale * weight_scale_2), a scale for 16 values and one for all. FP8:
    W = code * scale, one for all."""

    name = "modelopt"
    methods = ("modelopt",)
    files = (FILE,)

    @classmethod
    def find(cls, scan: CheckpointScan) -> Iterator[QuantizedWeight]:
        algorithm = _algorithm(scan) if scan.with_ending(".weight_scale") else None
        if algorithm is None:
            return
        for module, spec in scan.with_ending(".weight"):
            if spec.dtype != CODES[algorithm]:
                continue
            siblings = scan.siblings(spec.key, *SCALES[algorithm])
            if siblings is None or not _fits(scan, spec, siblings):
                continue
            if scan.is_scaled_for_inputs(f"{module}.pre_quant_scale"):
                continue
            yield cls.of(
                (spec, *siblings, *scan.present(f"{module}.", ACTIVATION_SCALES)),
                key=spec.key,
                dtype=scan.compute_dtype,
                shape=(spec.shape[0], spec.shape[1] * (2 if algorithm == "NVFP4" else 1)),
            )

    def decode(self, stored: Parts) -> Tensor:
        codes, scale, *_ = self.values(stored)
        if self._is_nvfp4:
            return fp4.decode_nvfp4(codes, scale, self._tensor_scale(stored))
        return fp8.decode_fp8(codes, scale, self._block)

    def encode(
        self, weight: Tensor, stored: Parts | None = None, draws: Draws | None = None
    ) -> Parts:
        """Encode; the global factor, which fused layers share, stays while the largest value
        fits."""
        if not self._is_nvfp4:
            old = self.stored_scale(stored)
            return self.as_parts(*fp8.requantize_fp8(weight, self._block, old, draws))
        both = (stored[self.parts[1].key], self._tensor_scale(stored)) if stored else None
        result = fp4.renew_nvfp4(weight, both, draws, divides=False)
        return self.as_parts(result.codes, result.scale, result.tensor_scale.value)

    def grid(self, stored: Parts) -> Grid:
        scale = self.values(stored)[1]
        if self._is_nvfp4:
            return fp4.nvfp4_grid(scale, self._tensor_scale(stored))
        (grid,) = fp8.grids(scale, self.shape, self._block)
        return grid

    def _tensor_scale(self, stored: Parts) -> fp4.TensorScale:
        return fp4.TensorScale(stored[self.parts[2].key], divides=False)

    @property
    def _is_nvfp4(self) -> bool:
        return self.parts[0].dtype == CODES["NVFP4"]

    @property
    def _block(self) -> tuple[int, int]:
        return (self.shape[0], self.shape[1])


def _algorithm(scan: CheckpointScan) -> str | None:
    """The layout that the configs agree on; None, with errors, if it is unknown."""
    stated: list[object] = []
    if scan.method == "modelopt":
        stated.append(scan.settings.get("quant_algo"))
    if FILE in scan.base.files and scan.method in ("modelopt", ""):
        config = read_json(scan.base.folder, FILE)
        producer, settings = config.get("producer"), config.get("quantization")
        is_modelopt = isinstance(producer, dict) and producer.get("name") == "modelopt"
        if is_modelopt and isinstance(settings, dict):
            stated.append(settings.get("quant_algo"))
    names = list(dict.fromkeys(map(shown, stated)))
    if len(names) > 1:
        problem = f"quant_algo {' and '.join(names)}"
        scan.check("quantization_config", False, problem, "one, the same in both files")
    elif names and names[0] not in CODES:
        scan.errors.add(f"modelopt's quant_algo {names[0]}", " or ".join(CODES), code="AK404")
    return names[0] if len(names) == 1 and names[0] in CODES else None


def _fits(scan: CheckpointScan, codes: TensorSpec, siblings: list[TensorSpec]) -> bool:
    """Return whether shapes and dtypes fit; an error is noted otherwise. The values of scales are
    checked later."""
    scale, *tensor_scales = siblings
    shape = codes.shape
    fits = len(shape) == 2 and 0 not in shape
    fits = fits and all(_is_one(spec) for spec in tensor_scales)
    if codes.dtype == "U8":
        expected = "F8_E4M3 scales, one for 16 values, and one F32 for all"
        fits = fits and 2 * shape[1] % NV_GROUP == 0 and scale.dtype == "F8_E4M3"
        fits = fits and scale.shape == (shape[0], 2 * shape[1] // NV_GROUP)
    else:
        expected = "one F32 scale"
        fits = fits and _is_one(scale)
    problem = ", ".join(f"{spec.dtype} {spec.shape}" for spec in (codes, *siblings))
    if not scan.check(codes.key, fits, problem, expected):
        return False
    scan.check_finite(scale)
    scan.check_finite(*tensor_scales, positive=True)
    return True


def _is_one(spec: TensorSpec) -> bool:
    return spec.dtype == "F32" and math.prod(spec.shape) == 1

"""awq: AutoAWQ's gemm and gemv layouts of 4 bits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from adapterkit.bases.quantized.codecs.gptq import AUTO_ROUND, auto_round_packing
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.errors import shown
from adapterkit.core.lazy import Tensor
from adapterkit.core.weights.codec import Parts, QuantizedWeight
from adapterkit.core.weights.decoded import CheckpointScan
from adapterkit.kernels.quant import gptq
from adapterkit.kernels.quant.grid import Grid
from adapterkit.kernels.quant.stochastic import Draws


@dataclass(frozen=True, kw_only=True)
class Awq(QuantizedWeight):
    """W[out, in] = (code - zero) * scale, stored [in, out / 8], the eight codes of a word in AWQ's
    order; gemv: [out, in / 8], with scales and zeros padded to more groups."""

    name = "awq"
    tier = "core"
    methods = ("awq", AUTO_ROUND)
    files = ("quant_config.json", "quantize_config.json")
    searches_scales = True

    symmetric: bool  # the zeros stay
    groups: int | None  # of columns, of the gemv layout

    @classmethod
    def find(cls, scan: CheckpointScan) -> Iterator[QuantizedWeight]:
        found = scan.with_ending(".qweight")
        is_own = scan.method in cls.methods and auto_round_packing(scan) in (None, "auto_awq")
        if not is_own or not found or not _is_known(scan):
            return
        for module, spec in found:
            settings = scan.settings
            symmetric = settings.get("zero_point", not settings.get("sym", False)) is False
            has_zeros = not symmetric or f"{module}.qzeros" in scan.tensors
            siblings = scan.siblings(module, ".scales", *([".qzeros"] if has_zeros else []))
            if siblings is None or not _fits(scan, spec, *siblings):
                continue
            scan.check_finite(siblings[0])
            groups, (first, words) = _groups_of_gemv(scan, spec), spec.shape
            yield cls.of(
                (spec, *siblings),
                key=f"{module}.weight",
                dtype=scan.compute_dtype,
                shape=(8 * words, first) if groups is None else (first, 8 * words),
                symmetric=symmetric,
                groups=groups,
            )

    def decode(self, stored: Parts) -> Tensor:
        old = self._tensors(stored)
        return gptq.decode_awq(old) if self.groups is None else gptq.decode_gemv(old, self.groups)

    def encode(
        self, weight: Tensor, stored: Parts | None = None, draws: Draws | None = None
    ) -> Parts:
        """Encode; a group keeps its scale and zero, or gets new ones if those are nearer to W."""
        assert stored is not None
        old = self._tensors(stored)
        how = {"keep_zeros": self.symmetric, "draws": draws}
        if self.groups is None:
            new = gptq.requantize_awq(weight, old, **how)
        else:
            new = gptq.requantize_gemv(weight, old, self.groups, **how)
        zeros = [] if new.zeros is None else [new.zeros]
        return self.as_parts(new.words, new.scale, *zeros)

    def grid(self, stored: Parts) -> Grid:
        old = self._tensors(stored)
        return gptq.awq_grid(old) if self.groups is None else gptq.gemv_grid(old, self.groups)

    @property
    def rows_per_block(self) -> int | None:
        return 8 if self.groups is None else 1  # of a word

    @property
    def row_axes(self) -> dict[int, tuple[int, int, int]]:
        if self.groups is not None:
            return dict.fromkeys(range(len(self.parts)), (0, 1, 1))
        return dict.fromkeys(range(len(self.parts)), (1, 1, 8)) | {1: (1, 1, 1)}

    def _tensors(self, stored: Parts) -> gptq.WordTensors:
        words, scale, *zeros = self.values(stored)
        return gptq.WordTensors(words, zeros[0] if zeros else None, scale)


def _versions(scan: CheckpointScan) -> list[str]:
    keys = ("version", "format", "checkpoint_format")
    return sorted({str(scan.settings[key]).lower() for key in keys if scan.settings.get(key)})


def _is_known(scan: CheckpointScan) -> bool:
    """Return whether the config has the gemm or the gemv layout; errors are noted otherwise."""
    settings, known, versions = scan.settings, True, _versions(scan)
    if versions not in ([], ["gemm"], ["gemv"]):
        scan.errors.add(
            f"AWQ's version {', '.join(map(shown, versions))}", "gemm or gemv", code="AK404"
        )
        known = False
    if str(settings.get("backend")).lower() == "llm-awq":
        scan.errors.add(
            "AWQ's backend llm-awq", "weights that AutoAWQ or GPTQModel packed", code="AK404"
        )
        known = False
    bits, size = settings.get("bits", settings.get("w_bit")), _group_size(scan)
    valid = bits == 4 and type(size) is int and (size == -1 or size > 0)
    problem = f"bits {shown(bits)}, group_size {shown(size)}"
    valid = scan.check("quantization_config", valid, problem, "4 bits, and a group_size")
    return valid and known


def _group_size(scan: CheckpointScan) -> Any:
    return scan.settings.get("group_size", scan.settings.get("q_group_size", 128))


def _groups_of_gemv(scan: CheckpointScan, codes: TensorSpec) -> int | None:
    """Groups per row in the gemv layout; None in the other."""
    size = _group_size(scan)
    return (1 if size == -1 else 8 * codes.shape[1] // size) if "gemv" in _versions(scan) else None


def _fits(
    scan: CheckpointScan, codes: TensorSpec, scale: TensorSpec, zeros: TensorSpec | None = None
) -> bool:
    specs = [codes, scale, *([zeros] if zeros else [])]
    fits = codes.dtype == "I32" and scale.dtype in ("F16", "BF16", "F32")
    fits = fits and (zeros is None or zeros.dtype == "I32")
    fits = fits and all(len(spec.shape) == 2 and 0 not in spec.shape for spec in specs)
    if fits:
        (first, words), size, groups = codes.shape, _group_size(scan), _groups_of_gemv(scan, codes)
        if groups is None:
            shape = (1 if size == -1 else first / size, words)
        else:  # zeros in whole words, of small groups in two or four
            each = 8 * {64: 2, 32: 4}.get(size, 1)
            shape = (first, math.ceil(groups / each) * each // 8)
            fits = zeros is not None and size * groups in (8 * words, -1)
        fits = fits and scale.shape == (shape[0], 8 * shape[1])
        fits = fits and (zeros is None or zeros.shape == shape)
    leaves = (f"{spec.key.rpartition('.')[2]} {spec.dtype} {spec.shape}" for spec in specs)
    expected = "words of eight 4-bit codes, and groups that divide the weight"
    return scan.check(codes.key, fits, ", ".join(leaves), expected)

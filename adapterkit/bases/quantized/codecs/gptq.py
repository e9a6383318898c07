"""gptq: AutoGPTQ's and GPTQModel's integers in words of 32 bits."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.errors import shown
from adapterkit.core.lazy import Tensor
from adapterkit.core.weights.codec import Parts, QuantizedWeight
from adapterkit.core.weights.decoded import CheckpointScan
from adapterkit.kernels.quant import gptq, integers
from adapterkit.kernels.quant.grid import WORD, Grid
from adapterkit.kernels.quant.stochastic import Draws

VERSIONS = {"gptq": 1, "gptq_v2": 2}
AUTO_ROUND = "auto-round"
PACKINGS = ("auto_gptq", "auto_awq")  # of auto-round: GPTQ's version 1, and AWQ's gemm


@dataclass(frozen=True, kw_only=True)
class Gptq(QuantizedWeight):
    """W[out, in] = (code - zero) * scale, stored [in, out]; g_idx: the group of each stored row."""

    name = "gptq"
    tier = "core"
    methods = ("gptq", AUTO_ROUND)
    files = ("quantize_config.json",)
    searches_scales = True

    bits: int
    version: int  # 1 stores zero - 1
    indexed: bool  # g_idx is stored
    symmetric: bool  # the zeros stay

    @classmethod
    def find(cls, scan: CheckpointScan) -> Iterator[QuantizedWeight]:
        found = scan.with_ending(".qweight")
        is_own = scan.method in cls.methods and auto_round_packing(scan) != "auto_awq"
        version = _version(scan) if is_own and found else None
        if version is None:
            return
        if scan.reads_freely:
            scan.fetch(spec for _, spec in scan.with_ending(".g_idx"))
        for module, spec in found:
            siblings = scan.siblings(module, ".qzeros", ".scales")
            bits = None if siblings is None else _bits(scan, spec, *siblings)
            if siblings is None or bits is None:
                continue
            shape = (spec.shape[1], spec.shape[0] * 32 // bits)
            index = scan.tensors.get(f"{module}.g_idx")
            if not _groups_fit(scan, spec.key, shape, siblings[1], index):
                continue
            scan.check_finite(siblings[1])
            yield cls.of(
                (spec, *siblings, *([index] if index else ())),
                key=f"{module}.weight",
                dtype=scan.compute_dtype,
                shape=shape,
                bits=bits,
                version=version,
                indexed=index is not None,
                symmetric=_is_symmetric(scan),
            )

    def contradiction(self, stored: Parts) -> tuple[str, str] | None:
        groups = self.parts[2].shape[0]
        if not self.indexed or integers.are_groups(stored[self.parts[3].key], groups):
            return None
        return f"groups out of range in {shown(self.parts[3].key)}", f"0 to {groups - 1}"

    def decode(self, stored: Parts) -> Tensor:
        return gptq.decode_gptq(*self._layout(stored))

    def encode(
        self, weight: Tensor, stored: Parts | None = None, draws: Draws | None = None
    ) -> Parts:
        """Encode; a group keeps its scale and zero, or gets new ones if those are nearer to W."""
        assert stored is not None
        old, bits, _, group, version = self._layout(stored)
        new = gptq.requantize_gptq(
            weight, old, bits, group, version, keep_zeros=self.symmetric, draws=draws
        )
        assert new.zeros is not None
        return self.as_parts(new.words, new.zeros, new.scale)

    def grid(self, stored: Parts) -> Grid:
        return gptq.gptq_grid(*self._layout(stored))

    @property
    def rows_per_block(self) -> int | None:
        # zeros are packed along the rows
        return WORD // math.gcd(WORD, self.bits)

    @property
    def row_axes(self) -> dict[int, tuple[int, int, int]]:
        return {0: (1, 1, 1), 1: (1, self.bits, WORD), 2: (1, 1, 1)}

    def _layout(self, stored: Parts) -> tuple[gptq.WordTensors, int, int, Tensor | None, int]:
        words, zeros, scale, *index = self.values(stored)
        group = index[0] if self.indexed else None
        return gptq.WordTensors(words, zeros, scale), self.bits, self.shape[1], group, self.version


def _is_symmetric(scan: CheckpointScan) -> bool:
    """Return whether zeros must stay, because kernels for symmetric weights do not read them: true
    unless the config has sym: false for all modules."""
    return scan.settings.get("sym") is not False or '"sym"' in json.dumps(_rules(scan))


def auto_round_packing(scan: CheckpointScan) -> str | None:
    """AutoRound's name of the layout, from a setting such as `auto_round:auto_gptq`; None for other
    methods."""
    if scan.method != AUTO_ROUND:
        return None
    stated = str(scan.settings.get("packing_format") or scan.settings.get("backend"))
    return stated.lower().removeprefix("auto_round:").partition(":")[0]


def _rules(scan: CheckpointScan) -> Any:
    """Settings of single modules, which may differ from those of the model."""
    return scan.settings.get("dynamic") or scan.settings.get("extra_config")


def _version(scan: CheckpointScan) -> int | None:
    """The storage of zeros according to the config; None, with errors, for other layouts."""
    settings, known, packing = scan.settings, True, auto_round_packing(scan)
    if packing not in (None, *PACKINGS):
        problem = f"AutoRound's packing_format {shown(packing)}"
        scan.errors.add(problem, " or ".join(PACKINGS), code="AK404")
        return None
    keys = ("checkpoint_format", "format")
    formats = {str(settings[key]).lower() for key in keys if settings.get(key)} or {"gptq"}
    if settings.get("is_marlin_format"):
        formats.add("marlin")
    if formats - set(VERSIONS) or len(formats) > 1:
        names = ", ".join(map(shown, sorted(formats)))
        scan.errors.add(f"GPTQ's checkpoint_format {names}", " or ".join(VERSIONS), code="AK404")
        known = False
    if settings.get("pack_dtype") not in (None, "int32"):
        scan.errors.add(f"GPTQ's pack_dtype {shown(settings['pack_dtype'])}", "int32", code="AK404")
        known = False
    bits, size = settings.get("bits"), settings.get("group_size")
    valid = bits in gptq.BITS and type(size) is int and (size == -1 or size > 0)
    problem = f"bits {shown(bits)}, group_size {shown(size)}"
    expected = "bits 2, 3, 4 or 8, and a group_size"
    valid = scan.check("quantization_config", valid, problem, expected)
    return VERSIONS[formats.pop()] if valid and known else None


def _bits(
    scan: CheckpointScan, codes: TensorSpec, zeros: TensorSpec, scale: TensorSpec
) -> int | None:
    """The bits implied by the shapes, which must be the config's unless modules may differ."""
    stated: Any = scan.settings.get("bits")
    bits = None
    fits = codes.dtype == zeros.dtype == "I32" and scale.dtype in ("F16", "BF16", "F32")
    fits = fits and all(
        len(spec.shape) == 2 and 0 not in spec.shape for spec in (codes, zeros, scale)
    )
    if fits:
        out = codes.shape[1]
        choices = gptq.BITS if _rules(scan) else (stated,)
        bits = next((n for n in choices if math.ceil(out * n / 32) == zeros.shape[1]), None)
        fits = zeros.shape[0] == scale.shape[0] and scale.shape[1] == out
        fits = fits and bits is not None and codes.shape[0] * 32 % bits == 0
    specs = {"qweight": codes, "qzeros": zeros, "scales": scale}
    problem = ", ".join(f"{name} {spec.dtype} {spec.shape}" for name, spec in specs.items())
    fits = scan.check(codes.key, fits, problem, f"words of {shown(stated)} bits that agree")
    return bits if fits else None


def _groups_fit(
    scan: CheckpointScan,
    key: str,
    shape: tuple[int, int],
    scale: TensorSpec,
    index: TensorSpec | None,
) -> bool:
    groups, size, width = scale.shape[0], scan.settings["group_size"], shape[1]
    expected = 1 if size == -1 else math.ceil(width / size)
    if _rules(scan):
        expected = groups
    problem = f"{groups} groups of {width} columns"
    if not scan.check(key, groups == expected, problem, f"{expected}, of {size}"):
        return False
    if index is None:
        problem = f"{width} columns in {groups} groups"
        return scan.check(key, width % groups == 0, problem, "groups that divide them, or g_idx")
    fits = index.dtype == "I32" and index.shape == (width,)
    if not scan.check(index.key, fits, f"g_idx {index.dtype} {index.shape}", f"I32 ({width},)"):
        return False
    if not scan.reads_freely:
        return True  # checked where it is read
    valid = integers.are_groups(scan.read(index, ()), groups)
    return scan.check(index.key, valid, "groups out of range", f"0 to {groups - 1}")

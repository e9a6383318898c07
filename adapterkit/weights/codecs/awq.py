"""awq: AutoAWQ's gemm layout of 4 bits."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from adapterkit.checkpoint.header import TensorSpec
from adapterkit.errors import shown
from adapterkit.kernels.quant.gptq import WordTensors, awq_grid, decode_awq, requantize_awq
from adapterkit.kernels.quant.grid import RoundColumn
from adapterkit.kernels.quant.stochastic import Draws
from adapterkit.weights.codec import QuantizedWeight
from adapterkit.weights.scan import CheckpointScan


@dataclass(frozen=True, kw_only=True)
class Awq(QuantizedWeight):
    """W[out, in] = (code - zero) * scale, stored [in, out / 8] with the eight codes of a word out
    of order."""

    name = "awq"
    methods = ("awq",)
    files = ("quant_config.json", "quantize_config.json")
    searches_scales = True

    symmetric: bool  # the zeros stay

    @classmethod
    def find(cls, scan: CheckpointScan) -> Iterator[QuantizedWeight]:
        found = scan.with_ending(".qweight")
        if scan.method not in cls.methods or not found or not _is_known(scan):
            return
        for module, spec in found:
            symmetric = scan.settings.get("zero_point", True) is False
            has_zeros = not symmetric or f"{module}.qzeros" in scan.tensors
            siblings = scan.siblings(module, ".scales", *([".qzeros"] if has_zeros else []))
            if siblings is None or not _fits(scan, spec, *siblings):
                continue
            scan.check_finite(siblings[0])
            yield cls.of(
                (spec, *siblings),
                key=f"{module}.weight",
                dtype=scan.compute_dtype,
                shape=(siblings[0].shape[1], spec.shape[0]),
                symmetric=symmetric,
            )

    def decode(self, stored: dict[str, Tensor]) -> Tensor:
        return decode_awq(self._tensors(stored))

    def encode_keeping_scales(
        self, stored: dict[str, Tensor], weight: Tensor, draws: Draws | None = None
    ) -> dict[str, Tensor]:
        """A group takes its old scale and zero, or new ones if those are nearer to W."""
        old = self._tensors(stored)
        new = requantize_awq(weight, old, keep_zeros=self.symmetric, draws=draws)
        zeros = [] if new.zeros is None else [new.zeros]
        return stored | self.as_parts(new.words, new.scale, *zeros)

    def column_rounder(self, stored: dict[str, Tensor]) -> RoundColumn:
        return awq_grid(self._tensors(stored)).round_column

    @property
    def rows_per_block(self) -> int | None:
        return 8  # of a word

    def row_views(
        self, stored: dict[str, Tensor], matrix: int, first: int, last: int
    ) -> dict[str, Tensor]:
        ends = {part.key: (first // 8, last // 8) for part in self.parts}
        ends[self.parts[1].key] = (first, last)
        return {key: stored[key][:, low:high] for key, (low, high) in ends.items()}

    def _tensors(self, stored: dict[str, Tensor]) -> WordTensors:
        words, scale, *zeros = self.values(stored)
        return WordTensors(words, zeros[0] if zeros else None, scale)


def _is_known(scan: CheckpointScan) -> bool:
    """Whether the config is of the gemm layout; else errors are noted."""
    settings, known = scan.settings, True
    keys = ("version", "format", "checkpoint_format")
    versions = sorted({str(settings[key]).lower() for key in keys if settings.get(key)})
    if versions not in ([], ["gemm"]):
        scan.errors.add(f"AWQ's version {', '.join(map(shown, versions))}", "gemm")
        known = False
    if str(settings.get("backend")).lower() == "llm-awq":
        scan.errors.add("AWQ's backend llm-awq", "weights that AutoAWQ or GPTQModel packed")
        known = False
    bits, size = settings.get("bits", settings.get("w_bit")), _group_size(scan)
    valid = bits == 4 and type(size) is int and (size == -1 or size > 0)
    problem = f"bits {shown(bits)}, group_size {shown(size)}"
    valid = scan.check("quantization_config", valid, problem, "4 bits, and a group_size")
    return valid and known


def _group_size(scan: CheckpointScan) -> Any:
    return scan.settings.get("group_size", scan.settings.get("q_group_size", 128))


def _fits(
    scan: CheckpointScan, codes: TensorSpec, scale: TensorSpec, zeros: TensorSpec | None = None
) -> bool:
    specs = [codes, scale, *([zeros] if zeros else [])]
    fits = codes.dtype == "I32" and scale.dtype in ("F16", "BF16", "F32")
    fits = fits and (zeros is None or zeros.dtype == "I32")
    fits = fits and all(len(spec.shape) == 2 and 0 not in spec.shape for spec in specs)
    if fits:
        (width, words), size = codes.shape, _group_size(scan)
        groups = 1 if size == -1 else width / size
        fits = scale.shape == (groups, 8 * words)
        fits = fits and (zeros is None or zeros.shape == (groups, words))
    leaves = (f"{spec.key.rpartition('.')[2]} {spec.dtype} {spec.shape}" for spec in specs)
    expected = "words of eight 4-bit codes, and groups that divide the weight"
    return scan.check(codes.key, fits, ", ".join(leaves), expected)

"""hqq: Half-Quadratic Quantization's integers, described by tensors of their module; read only."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from adapterkit.core import dtypes
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.errors import shown
from adapterkit.core.lazy import Tensor
from adapterkit.core.weights.codec import Parts, QuantizedWeight
from adapterkit.core.weights.decoded import CheckpointScan
from adapterkit.kernels.quant import integers

# hqq's name of a layout -> bits of a code, codes in a word, dtype of words
PACKINGS = {
    "8bit_u8": (8, 1, "U8"),  # of 5 and 6 bits too
    "4bit_u8": (4, 2, "U8"),
    "3bit_32": (3, 10, "I32"),
    "2bit_u8": (2, 4, "U8"),  # of 1.58 bits too
    "1bit_u8": (1, 8, "U8"),
}
NAMES = ("W_q", "scale", "zero")
SAID = ("shape", "packing")  # read while planning
OTHERS = (
    "nbits group_size axis unpack_view_dtype view_as_float quant_scale quant_zero compute_dtype "
    "offload_meta encoded_state_dict stores_quant_config channel_wise optimize round_zero"
).split()


@dataclass(frozen=True, kw_only=True)
class Hqq(QuantizedWeight):
    """W = (code - zero) * scale, for W reshaped to rows or columns of groups."""

    name = "hqq"
    methods = ("hqq",)

    packing: str

    @classmethod
    def find(cls, scan: CheckpointScan) -> Iterator[QuantizedWeight]:
        found = scan.with_ending(".W_q") if scan.method in cls.methods else []
        declared = (f"{module}.{name}" for module, _ in found for name in SAID)
        scan.fetch(scan.tensors[key] for key in declared if key in scan.tensors)
        for module, _ in found:
            siblings = scan.siblings(f"{module}.", *NAMES, *SAID)
            if siblings is None:
                continue
            size, packing = (scan.read(spec, siblings[:1]) for spec in siblings[3:])
            shape, text = (
                tuple(size.tolist()),
                bytes(packing.reshape(-1).tolist()).decode("latin-1"),
            )
            if not _fits(scan, text, shape, siblings):
                continue
            scan.check_finite(*siblings[1:3])
            others = scan.present(f"{module}.", OTHERS)
            yield cls.of(
                (*siblings, *others),
                key=f"{module}.weight",
                dtype=scan.compute_dtype,
                shape=shape,
                packing=text,
            )

    def decode(self, stored: Parts) -> Tensor:
        words, scale, zero, *_ = self.values(stored)
        bits, fields, dtype = PACKINGS[self.packing]
        words = words.view(dtypes.torch_dtype(dtype))  # float dtypes that may store them
        rows = math.prod(self.shape) // words.shape[1]
        return integers.decode_hqq(words, scale, zero, bits, fields, rows).view(self.shape)

    @property
    def read_only(self) -> str | None:
        return "hqq's zeros and scales are optimized together, by its own library"


def _fits(
    scan: CheckpointScan, packing: str, shape: tuple[int, ...], specs: list[TensorSpec]
) -> bool:
    """Return whether the words have enough bits for the codes, and each row or column of them has a
    scale and a zero."""
    words, scale, zero, *_ = specs
    if packing not in PACKINGS:
        scan.errors.add(
            f"{shown(words.key)}: hqq's {shown(packing)}", ", ".join(PACKINGS), code="AK404"
        )
        return False
    _, fields, dtype = PACKINGS[packing]
    fits = len(shape) == len(words.shape) == 2 and 0 not in (*shape, *words.shape)
    if fits:
        columns = words.nbytes // words.shape[0] // dtypes.size(dtype, 1)
        rows, rest = divmod(math.prod(shape), max(columns, 1))
        fits = rest == 0 and words.shape[0] == math.ceil(rows / fields)
        fits = fits and scale.shape == zero.shape and scale.shape in ((rows, 1), (1, columns))
    problem = f"{words.dtype} {words.shape}, scales {scale.shape}, zeros {zero.shape}, of {shape}"
    return scan.check(words.key, fits, problem, f"codes of {packing}, with a scale for each group")

"""torchao: tensor subclasses, flattened into safetensors, described in the header's metadata; read
only."""

from collections.abc import Iterator
from dataclasses import dataclass

from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.checkpoint.strict import nested_json
from adapterkit.core.errors import shown
from adapterkit.core.lazy import Tensor
from adapterkit.core.records import Json
from adapterkit.core.weights.codec import Parts, QuantizedWeight, pair_in, shapes_of_scales
from adapterkit.core.weights.decoded import CheckpointScan
from adapterkit.kernels.quant import fp8, integers

NAMES = ("qdata", "scale", "zero_point")
ACTIVATION_SCALES = ("act_quant_scale", "act_quant_zero_point")
KINDS = {  # dtype of codes; whether there may be zeros, whether there must be
    "Float8Tensor": ("F8_E4M3", False, False),
    "Int8Tensor": ("I8", True, False),
    "IntxUnpackedToInt8Tensor": ("I8", True, True),
    "Int4Tensor": ("U8", True, True),
}
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@dataclass(frozen=True, kw_only=True)
class Torchao(QuantizedWeight):
    """W = (code - zero) * scale, a scale for a block of W; Int4Tensor: code * scale + zero."""

    name = "torchao"
    methods = ("torchao",)

    kind: str
    block: tuple[int, int]
    has_zeros: bool

    @classmethod
    def find(cls, scan: CheckpointScan) -> Iterator[QuantizedWeight]:
        if scan.method not in cls.methods:
            return
        metadata: dict[str, str] = {}
        for header in scan.base.shards.values():
            metadata |= header.metadata
        for key, text in metadata.items():
            description = _parsed(text) if "." in key else None
            kind = str(description.get("_type")) if description else "Tensor"
            if description is None or kind == "Tensor":
                continue
            if kind not in KINDS:
                scan.errors.add(
                    f"{shown(key)}: torchao's {shown(kind)}", ", ".join(KINDS), code="AK404"
                )
                continue
            record = cls._record(scan, key, kind, description)
            if record is not None:
                yield record

    @classmethod
    def _record(
        cls, scan: CheckpointScan, key: str, kind: str, description: Json
    ) -> "Torchao | None":
        start, _, leaf = key.rpartition(".")
        prefix = f"{start}._{leaf}_"
        code_dtype, optional, required = KINDS[kind]
        has_zeros = required or (optional and prefix + "zero_point" in scan.tensors)
        siblings = scan.siblings(prefix, *NAMES[: 3 if has_zeros else 2])
        if siblings is None:
            return None
        if scan.is_scaled_for_inputs(prefix + "act_pre_scale"):
            return None
        codes, scale, *zeros = siblings
        data = description.get("_data")
        data = data if isinstance(data, dict) else {}
        fits = len(codes.shape) == 2 and 0 not in codes.shape and codes.dtype == code_dtype
        fits = fits and scale.dtype in DTYPES.values()
        shape = codes.shape
        if fits and kind == "Int4Tensor":
            shape = (codes.shape[0], 2 * codes.shape[1])
        block = pair_in(data.get("block_size"))
        fits = fits and block is not None and _scales_fit(kind, shape, block, scale, zeros)
        problem = f"{kind} {codes.dtype} {codes.shape}, scales {scale.dtype} {scale.shape}, "
        problem += f"block_size {shown(data.get('block_size'))}"
        expected = f"{code_dtype}, and a scale for each block"
        if not scan.check(key, fits, problem, expected) or block is None:
            return None
        scan.check_finite(scale, *(zeros if kind == "Int4Tensor" else []))
        stated = data.get("dtype")
        dtype = scale.dtype
        if isinstance(stated, dict):
            dtype = DTYPES.get(str(stated.get("_data")), scan.compute_dtype)
        return cls.of(
            (*siblings, *scan.present(prefix, ACTIVATION_SCALES)),
            key=key,
            dtype=dtype,
            shape=shape,
            kind=kind,
            block=block,
            has_zeros=has_zeros,
        )

    def decode(self, stored: Parts) -> Tensor:
        codes, scale, *zeros = self.values(stored)
        if self.kind == "Int4Tensor":
            return integers.decode_torchao_int4(codes, scale, zeros[0])
        if self.kind == "Float8Tensor":
            return fp8.decode_fp8(codes, scale, self.block)
        return integers.decode_int8(codes, scale, zeros[0] if self.has_zeros else None)

    @property
    def read_only(self) -> str | None:
        return "torchao's files are written by its own tensors"


def _parsed(text: str) -> Json | None:
    try:
        value = nested_json(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) and "_type" in value else None


def _scales_fit(
    kind: str,
    shape: tuple[int, ...],
    block: tuple[int, int],
    scale: TensorSpec,
    zeros: list[TensorSpec],
) -> bool:
    """Return whether there is a scale for each block, and a zero for each if there are any."""
    if any(n % size for n, size in zip(shape, block, strict=True)):
        return False
    rows, columns = shape[0] // block[0], shape[1] // block[1]
    if kind == "Int4Tensor":
        fits = rows == shape[0] and scale.shape == (columns, rows)
        return fits and all(
            (zero.shape, zero.dtype) == (scale.shape, scale.dtype) for zero in zeros
        )
    if kind != "Float8Tensor" and not (rows == shape[0] or rows == columns == 1):
        return False
    fits = scale.shape in shapes_of_scales((rows, columns))
    return fits and all(zero.dtype == "I8" and zero.shape == scale.shape for zero in zeros)

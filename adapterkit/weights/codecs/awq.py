"""awq: AutoAWQ's gemm layout of 4 bits, read only: its codes come from calibration."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from adapterkit.checkpoint.header import TensorSpec
from adapterkit.errors import shown
from adapterkit.kernels.integers import decode_awq
from adapterkit.weights.codec import CheckpointScan, QuantizedWeight

CODES = ".qweight"


@dataclass(frozen=True, kw_only=True)
class Awq(QuantizedWeight):
    """W[out, in] = (code - zero) * scale, stored [in, out / 8] with the eight codes of a word out of order."""

    name = "awq"
    methods = ("awq",)
    files = ("quant_config.json", "quantize_config.json")

    @classmethod
    def find(cls, found: CheckpointScan) -> Iterator[QuantizedWeight]:
        if found.method not in cls.methods or not found.has_keys(CODES) or not _known(found):
            return
        for key, spec in list(found.tensors.items()):
            if not key.endswith(CODES):
                continue
            module = key.removesuffix(CODES)
            zeroed = (
                found.settings.get("zero_point", True) is not False
                or f"{module}.qzeros" in found.tensors
            )
            siblings = found.siblings(module, ".scales", *([".qzeros"] if zeroed else []))
            if siblings is None or not _fits(found, key, spec, *siblings):
                continue
            found.check_finite(siblings[0])
            shape = (siblings[0].shape[1], spec.shape[0])
            place = {
                "file": spec.file,
                "start": spec.start,
                "stop": spec.stop,
                "folder": spec.folder,
            }
            yield cls(
                key=f"{module}.weight",
                dtype=found.compute_dtype,
                shape=shape,
                parts=(spec, *siblings),
                **place,
            )

    def decode(self, stored: dict[str, Tensor]) -> Tensor:
        words, scale, *zeros = (stored[part.key] for part in self.parts)
        return decode_awq(words, zeros[0] if zeros else None, scale)

    @property
    def read_only(self) -> str | None:
        return "AWQ chooses its codes on data that is not here"


def _known(found: CheckpointScan) -> bool:
    said, good = found.settings, True
    forms = sorted(
        {
            str(said[key]).lower()
            for key in ("version", "format", "checkpoint_format")
            if said.get(key)
        }
    )
    if forms not in ([], ["gemm"]):
        found.refuse(f"AWQ's version {', '.join(map(shown, forms))}", "gemm")
        good = False
    if str(said.get("backend")).lower() == "llm-awq":
        found.refuse("AWQ's backend llm-awq", "weights that AutoAWQ or GPTQModel packed")
        good = False
    bits, size = (
        said.get("bits", said.get("w_bit")),
        said.get("group_size", said.get("q_group_size", 128)),
    )
    fits = bits == 4 and type(size) is int and (size == -1 or size > 0)
    return (
        found.check(
            "quantization_config",
            fits,
            f"bits {shown(bits)}, group_size {shown(size)}",
            "4 bits, and a group_size",
        )
        and good
    )


def _fits(
    found: CheckpointScan,
    key: str,
    codes: TensorSpec,
    scale: TensorSpec,
    zeros: TensorSpec | None = None,
) -> bool:
    specs = [codes, scale, *([zeros] if zeros else [])]
    good = (
        codes.dtype == "I32"
        and scale.dtype in ("F16", "BF16", "F32")
        and (zeros is None or zeros.dtype == "I32")
    )
    good = good and all(len(spec.shape) == 2 and 0 not in spec.shape for spec in specs)
    if good:
        (width, words), size = (
            codes.shape,
            found.settings.get("group_size", found.settings.get("q_group_size", 128)),
        )
        groups = 1 if size == -1 else width / size
        good = scale.shape == (groups, 8 * words) and (
            zeros is None or zeros.shape == (groups, words)
        )
    text = ", ".join(f"{spec.key.rpartition('.')[2]} {spec.dtype} {spec.shape}" for spec in specs)
    return found.check(
        key, good, text, "words of eight 4-bit codes, and groups that divide the weight"
    )

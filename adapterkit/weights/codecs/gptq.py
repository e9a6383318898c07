"""gptq: AutoGPTQ's and GPTQModel's integers in words of 32 bits, read only: its codes come from calibration."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from adapterkit.checkpoint.header import TensorSpec
from adapterkit.errors import shown
from adapterkit.kernels.integers import decode_gptq
from adapterkit.weights.codec import CheckpointScan, QuantizedWeight

CODES = ".qweight"
VERSIONS = {"gptq": 1, "gptq_v2": 2}
BITS = (2, 3, 4, 8)


@dataclass(frozen=True, kw_only=True)
class Gptq(QuantizedWeight):
    """W[out, in] = (code - zero) * scale, stored [in, out]; g_idx says which group a row of it is in."""

    name = "gptq"
    methods = ("gptq",)
    files = ("quantize_config.json",)

    bits: int
    version: int  # 1 stores zero - 1
    indexed: bool

    @classmethod
    def find(cls, found: CheckpointScan) -> Iterator[QuantizedWeight]:
        version = _version(found) if found.method in cls.methods and found.has_keys(CODES) else None
        if version is None:
            return
        found.fetch(spec for key, spec in found.tensors.items() if key.endswith(".g_idx"))
        for key, spec in list(found.tensors.items()):
            if not key.endswith(CODES):
                continue
            module = key.removesuffix(CODES)
            siblings = found.siblings(module, ".qzeros", ".scales")
            if siblings is None:
                continue
            bits = _bits(found, key, spec, *siblings)
            if bits is None:
                continue
            shape = (spec.shape[1], spec.shape[0] * 32 // bits)
            index = found.tensors.get(f"{module}.g_idx")
            if not _groups_fit(found, key, shape, siblings[1], index):
                continue
            found.check_finite(siblings[1])
            parts = (spec, *siblings, *([index] if index else ()))
            about = {"bits": bits, "version": version, "indexed": index is not None}
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
                parts=parts,
                **about,
                **place,
            )

    def decode(self, stored: dict[str, Tensor]) -> Tensor:
        words, zeros, scale, *index = (stored[part.key] for part in self.parts)
        group = index[0] if self.indexed else None
        return decode_gptq(words, zeros, scale, self.bits, self.shape[1], group, self.version)

    @property
    def read_only(self) -> str | None:
        return "GPTQ chooses its codes on data that is not here"


def _version(found: CheckpointScan) -> int | None:
    """How the config says that zeros are stored; None, with errors, for other layouts."""
    said, good = found.settings, True
    forms = {
        str(said[key]).lower() for key in ("checkpoint_format", "format") if said.get(key)
    } or {"gptq"}
    if said.get("is_marlin_format"):
        forms.add("marlin")
    unknown = forms - set(VERSIONS)
    if unknown or len(forms) > 1:
        found.refuse(
            f"GPTQ's checkpoint_format {', '.join(map(shown, sorted(forms)))}",
            " or ".join(VERSIONS),
        )
        good = False
    if said.get("pack_dtype") not in (None, "int32"):
        found.refuse(f"GPTQ's pack_dtype {shown(said['pack_dtype'])}", "int32")
        good = False
    bits, size = said.get("bits"), said.get("group_size")
    fits = bits in BITS and type(size) is int and (size == -1 or size > 0)
    text = f"bits {shown(bits)}, group_size {shown(size)}"
    good = (
        found.check("quantization_config", fits, text, "bits 2, 3, 4 or 8, and a group_size")
        and good
    )
    return VERSIONS[forms.pop()] if good else None


def _bits(
    found: CheckpointScan, key: str, codes: TensorSpec, zeros: TensorSpec, scale: TensorSpec
) -> int | None:
    """What shapes say, and the config with them, unless it says that modules differ."""
    said: Any = found.settings.get("bits")
    good = codes.dtype == zeros.dtype == "I32" and scale.dtype in ("F16", "BF16", "F32")
    good = good and all(
        len(spec.shape) == 2 and 0 not in spec.shape for spec in (codes, zeros, scale)
    )
    bits = None
    if good:
        out = codes.shape[1]
        choices = BITS if found.settings.get("dynamic") else (said,)
        bits = next((n for n in choices if math.ceil(out * n / 32) == zeros.shape[1]), None)
        good = (
            bits is not None
            and zeros.shape[0] == scale.shape[0]
            and scale.shape[1] == out
            and codes.shape[0] * 32 % bits == 0
        )
    text = f"qweight {codes.dtype} {codes.shape}, qzeros {zeros.dtype} {zeros.shape}, scales {scale.dtype} {scale.shape}"
    return bits if found.check(key, good, text, f"words of {shown(said)} bits that agree") else None


def _groups_fit(
    found: CheckpointScan,
    key: str,
    shape: tuple[int, int],
    scale: TensorSpec,
    index: TensorSpec | None,
) -> bool:
    groups, size = scale.shape[0], found.settings["group_size"]
    dynamic = bool(found.settings.get("dynamic"))
    expected = groups if dynamic else 1 if size == -1 else math.ceil(shape[1] / size)
    if not found.check(
        key, groups == expected, f"{groups} groups of {shape[1]} columns", f"{expected}, of {size}"
    ):
        return False
    if index is None:
        return found.check(
            key,
            shape[1] % groups == 0,
            f"{shape[1]} columns in {groups} groups",
            "groups that divide them, or g_idx",
        )
    text = f"g_idx {index.dtype} {index.shape}"
    if not found.check(
        index.key, index.dtype == "I32" and index.shape == (shape[1],), text, f"I32 ({shape[1]},)"
    ):
        return False
    values = found.read(index)
    good = bool((values >= 0).all()) and bool((values < groups).all())
    return found.check(index.key, good, "groups out of range", f"0 to {groups - 1}")

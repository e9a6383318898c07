"""View a quantized checkpoint as the float checkpoint that it decodes to. Codecs look for their
weights in a `CheckpointScan`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from adapterkit.core import dtypes
from adapterkit.core.checkpoint.folder import LocalFolder
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.checkpoint.reader import FEW, read_small
from adapterkit.core.checkpoint.spec import Checkpoint
from adapterkit.core.checkpoint.strict import nested_json
from adapterkit.core.errors import Damaged, Problems, shown
from adapterkit.core.records import Json
from adapterkit.core.registry import members
from adapterkit.core.weights.codec import QuantizedWeight
from adapterkit.core.weights.detect import (
    PACKED,
    check_not_quantized,
    quantization_evidence,
    without_quantization,
)
from adapterkit.core.weights.names import Names
from adapterkit.core.weights.parameters import Slot, SlottedCheckpoint

CODES = ("U8", "I8", "I32", *PACKED)  # dtypes that matrices of float models never have
# bytes; a weight's larger scales are checked when they are decoded, not while planning
MAX_CHECKED = 1 << 20
NUMBER = re.compile(r"\d+")


def decoded_view(base: Checkpoint) -> Checkpoint:
    """The checkpoint with a `QuantizedWeight` instead of the tensors of each, and a config without
    quantization; the same object if nothing is quantized.

    Raises `Refused` or `Damaged`, all at once, for unknown formats, missing siblings, shapes that
    do not fit, and scales that are not finite."""
    if quantization_evidence(base.config, base.tensors) is None:
        return base
    settings = base.config.get("quantization") or base.config.get("quantization_config")
    errors = Problems(where=base.name, hint="dequantize it first with the tool that made it")
    settings = settings if isinstance(settings, dict) else {}
    scan = CheckpointScan(base, settings, dict(base.tensors), errors)
    codecs = members("codecs").values()
    weights: list[QuantizedWeight] = []
    for codec in codecs:
        for weight in codec.find(scan):
            weights.append(weight)
            for part in weight.parts:
                scan.tensors.pop(part.key, None)
    scan.check_scales()
    _note_unclaimed(scan, weights)
    _note_duplicates(scan, weights)
    scan.errors.raise_all()
    by_codes = {weight.parts[0].key: weight for weight in weights}
    kept = scan.tensors | by_codes
    tensors = {getattr(by_codes.get(k), "key", k): kept[k] for k in base.tensors if k in kept}
    is_known = bool(weights) and any(scan.method in codec.methods for codec in codecs)
    config = without_quantization(base.config) if is_known else base.config
    view = replace(base, tensors=tensors, config=config)
    from adapterkit.core.weights.unread import unread_hint

    check_not_quantized(replace(view, tensors=scan.tensors), unread_hint(scan.method))
    return SlottedCheckpoint(**vars(view), slots=scan.slots) if scan.slots else view


def _note_duplicates(scan: CheckpointScan, weights: list[QuantizedWeight]) -> None:
    """Note weights that are stored twice: as floats too, or in two formats."""
    codes: dict[str, str] = {}
    for weight in weights:
        parts, plain = {part.key for part in weight.parts}, scan.base.tensors
        as_floats = weight.key if weight.key in plain and weight.key not in parts else None
        other = codes.get(weight.key) or as_floats
        if other is not None:
            scan.errors.add(
                f"{shown(weight.key)} is stored as {shown(other)} and as "
                f"{shown(weight.parts[0].key)}",
                "each weight once",
                "remove the tensors that are not part of the model",
                kind=Damaged,
                code="AK404",
            )
        codes[weight.key] = weight.parts[0].key


def _note_unclaimed(scan: CheckpointScan, weights: list[QuantizedWeight]) -> None:
    """Note tensors that look like codes and that no codec claimed, if codecs claimed others."""
    for key, spec in scan.tensors.items() if weights and not scan.errors else ():
        # old attention masks are called bias
        if spec.dtype in CODES and len(spec.shape) > 1 and not key.endswith("bias"):
            scan.errors.add(
                f"{shown(key)} is {spec.dtype} {spec.shape}, next to weights of {weights[0].name}",
                "formats that are known",
                "dequantize it first, with the tool that made it",
                code="AK404",
            )


def quantized_weights(tensors: Mapping[str, TensorSpec]) -> list[QuantizedWeight]:
    """The quantized weights among tensors."""
    return [spec for spec in tensors.values() if isinstance(spec, QuantizedWeight)]


def quantization_files(tensors: Mapping[str, TensorSpec]) -> set[str]:
    """Names of files that declare these tensors as quantized, and have no meaning for floats."""
    return {name for weight in quantized_weights(tensors) for name in weight.files}


@dataclass
class CheckpointScan:
    """A quantized checkpoint for codecs to search, with the errors that they note."""

    base: Checkpoint
    settings: Json  # the config's quantization_config
    tensors: dict[str, TensorSpec]  # tensors that no codec has claimed yet
    errors: Problems
    slots: dict[str, tuple[Slot, ...]] = field(default_factory=dict)  # that no loader makes
    # (scale, whether it must be above 0)
    _scales: list[tuple[TensorSpec, bool]] = field(default_factory=list)
    _cache: dict[str, bytes] = field(default_factory=dict)  # fetched tensors by key
    _alike: dict[tuple, bytes] = field(default_factory=dict)  # the first tensor of each kind

    @property
    def method(self) -> str:
        unnamed = "mlx" if self.base.config.get("quantization") else ""
        return str(self.settings.get("quant_method") or unnamed).lower()

    def with_ending(self, ending: str) -> list[tuple[str, TensorSpec]]:
        """The tensors whose keys have that ending, each with its key without it."""
        found = (item for item in self.tensors.items() if item[0].endswith(ending))
        return [(key.removesuffix(ending), spec) for key, spec in found]

    def present(self, start: str, endings: Iterable[str]) -> list[TensorSpec]:
        """The tensors `start + ending` that exist."""
        keys = (start + ending for ending in endings)
        return [self.tensors[key] for key in keys if key in self.tensors]

    @cached_property
    def names(self) -> Names:
        """The names of the model without quantization."""
        config = without_quantization(self.base.config)
        return Names(replace(self.base, config=config), build_model=True)

    def model_name(self, module: str) -> str:
        """The module's name in the loaded model; its weight is stored under `module.weight`."""
        model = self.names.model
        if model is None:
            return module
        return model.renamed(f"{module}.weight").removesuffix(".weight")

    @property
    def compute_dtype(self) -> str:
        """The model's dtype by its config (header name). If it has none, the more frequent of F16
        and BF16 among the tensors."""
        dtype = self.base.config.get("dtype") or self.base.config.get("torch_dtype")
        return dtypes.HEADER_NAME.get(str(dtype).removeprefix("torch."), self._usual_dtype)

    @cached_property
    def _usual_dtype(self) -> str:
        stored = [spec.dtype for spec in self.base.tensors.values()]
        return max(("BF16", "F16"), key=stored.count)

    def siblings(self, key: str, *endings: str) -> list[TensorSpec] | None:
        """The tensors `key + ending`; None, with an error, if one is missing."""
        missing = [ending for ending in endings if key + ending not in self.tensors]
        if missing:
            self.errors.add(
                f"{shown(key)} is without {', '.join(missing)}",
                "the tensors that belong to it",
                "download the checkpoint again; without its scales the weight means nothing",
                kind=Damaged,
                code="AK202",
            )
            return None
        return [self.tensors[key + ending] for ending in endings]

    def check(self, key: str, fits: bool, problem: str, expected: str) -> bool:
        """Note an error unless the shapes and dtypes fit."""
        if not fits:
            hint = "download the checkpoint again, or restore its config"
            self.errors.add(f"{shown(key)}: {problem}", expected, hint, kind=Damaged, code="AK202")
        return fits

    def is_scaled_for_inputs(self, key: str) -> bool:
        """Return whether a tensor of that name marks a weight as scaled for its inputs, which is
        noted as an error."""
        if key in self.tensors:
            problem = f"{shown(key)}: a weight scaled for its inputs"
            self.errors.add(problem, "weights as the model has them", code="AK202")
        return key in self.tensors

    def fetch(self, specs: Iterable[TensorSpec]) -> None:
        """Read tensors for `read` and `read_json`, in a few reads of each file. For a remote
        folder, only those of files that store them together."""
        read = read_small(self.base.folder, specs, None if self.reads_freely else FEW)
        self._cache |= {spec.key: bytes(data) for spec, data in read}

    def read(self, spec: TensorSpec, next_to: Sequence[TensorSpec]) -> np.ndarray:
        """The value of one of these small stored tensors; call `fetch` first for many.

        In a remote folder, a tensor that was not fetched is assumed to equal that of the first
        weight of its kind: keys that differ in numbers only, with equal dtypes and shapes. Decoding
        checks it later (`read_parts`)."""
        return array_of(self._bytes(spec, next_to), spec.dtype).reshape(spec.shape)

    def read_json(self, spec: TensorSpec, next_to: Sequence[TensorSpec]) -> Json:
        """A JSON object stored as a tensor of bytes, read as `read` does; {}, with an error, for
        other values."""
        try:
            value = nested_json(self._bytes(spec, next_to))
        except ValueError:
            value = None
        if not isinstance(value, dict):
            self.check(spec.key, False, "not a JSON object", "a JSON object as bytes")
            return {}
        return value

    def _bytes(self, spec: TensorSpec, next_to: Sequence[TensorSpec]) -> bytes:
        if spec.key in self._cache:
            return self._cache[spec.key]
        read = lambda: self.base.folder.read(spec.file, spec.start, spec.stop)
        if self.reads_freely:
            return read()
        kind = (NUMBER.sub("#", spec.key), *((other.dtype, other.shape) for other in next_to))
        if kind not in self._alike:
            self._alike[kind] = read()
        return self._alike[kind]

    def check_finite(self, *scales: TensorSpec, positive: bool = False) -> None:
        """Register scales that `check_scales` has to find finite, or also above 0. 0 is legal,
        because a block of zeros has it."""
        self._scales += [(spec, positive) for spec in scales if spec.nbytes <= MAX_CHECKED]

    @property
    def reads_freely(self) -> bool:
        """True if a read of each weight costs little. In a remote folder each would be a request,
        mostly for weights that no job changes."""
        return isinstance(self.base.folder, LocalFolder)

    def check_scales(self) -> None:
        """Note an error for each scale that is NaN or infinite. U8 scales are exponents, and 255 is
        NaN.

        Remote folders are not read; decoding checks their weights later (`decode_checked`)."""
        if not self.reads_freely:
            return
        positive = {spec.key for spec, positive in self._scales if positive}
        for spec, data in read_small(self.base.folder, [spec for spec, _ in self._scales]):
            values = array_of(data, "F8_E8M0" if spec.dtype == "U8" else spec.dtype)
            valid, problem = np.isfinite(values), "scales that are NaN or infinite"
            if spec.key in positive:
                valid, problem = valid & (values > 0), f"{problem} or not above 0"
            self.check(spec.key, bool(valid.all()), problem, "finite scales")


def array_of(data: bytes | memoryview, dtype: str) -> np.ndarray:
    """The values of stored bytes, of a dtype in `dtypes.NUMBERS` or of 8 bits. It works without
    torch, whose import takes longer than a plan."""
    if dtype in dtypes.CODES:
        return np.frombuffer(data, f"<{dtypes.CODES[dtype]}")
    if dtype == "BF16":
        return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
    bits = np.frombuffer(data, "u1").astype("<u2")
    if dtype == "F8_E5M2":
        return (bits << 8).view("<f2")
    if dtype == "F8_E8M0":
        return np.where(bits == 255, np.nan, np.exp2(bits - 127.0))
    assert dtype == "F8_E4M3"  # a half's exponent has a bit more, and a bias that is 8 larger
    halves = ((bits & 0x80) << 8 | (bits & 0x7F) << 7).view("<f2")
    return np.where(bits & 0x7F == 0x7F, np.nan, halves * np.float32(256))

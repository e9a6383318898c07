"""A quantized checkpoint as the plain one that it decodes to."""

from collections.abc import Mapping
from dataclasses import replace

from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.checkpoint.spec import Checkpoint
from adapterkit.core.errors import Damaged, Problems, shown
from adapterkit.core.registry import members
from adapterkit.core.weights.codec import QuantizedWeight
from adapterkit.core.weights.detect import (
    PACKED,
    check_not_quantized,
    quantization_evidence,
    without_quantization,
)
from adapterkit.core.weights.scan import CheckpointScan

CODES = ("U8", "I8", "I32", *PACKED)  # dtypes of tensors that no plain model has as matrices


def decoded_view(base: Checkpoint) -> Checkpoint:
    """The checkpoint with a `QuantizedWeight` in place of the tensors that hold it, and a config
    without quantization; the same object if nothing is quantized.

    `Refused` or `Damaged`, all at once, for unknown formats, missing siblings, shapes that do not
    fit, scales that are not finite.
    """
    if quantization_evidence(base.config, base.tensors) is None:
        return base
    settings = base.config.get("quantization_config")
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
    tensors = {}
    for key, spec in base.tensors.items():
        if key in by_codes:
            tensors[by_codes[key].key] = by_codes[key]
        elif key in scan.tensors:
            tensors[key] = spec
    known = {method for codec in codecs for method in codec.methods}
    is_known = bool(weights) and scan.method in known
    config = without_quantization(base.config) if is_known else base.config
    view = replace(base, tensors=tensors, config=config)
    check_not_quantized(replace(view, tensors=scan.tensors))
    return view


def _note_duplicates(scan: CheckpointScan, weights: list[QuantizedWeight]) -> None:
    """Weights that are stored twice: as floats too, or in two formats."""
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
    """Tensors that look like codes and that no codec claimed, in a checkpoint where others were
    claimed."""
    for key, spec in scan.tensors.items() if weights and not scan.errors else ():
        # old attention masks are called bias
        if spec.dtype in CODES and len(spec.shape) > 1 and not key.endswith("bias"):
            scan.errors.add(
                f"{shown(key)} is {spec.dtype} {spec.shape}, beside weights of {weights[0].name}",
                "formats that are known",
                "dequantize it first, with the tool that made it",
                code="AK404",
            )


def quantized_weights(tensors: Mapping[str, TensorSpec]) -> list[QuantizedWeight]:
    """The quantized weights among tensors."""
    return [spec for spec in tensors.values() if isinstance(spec, QuantizedWeight)]


def quantization_files(tensors: Mapping[str, TensorSpec]) -> set[str]:
    """Names of files that say that these tensors are quantized, and mean nothing beside floats."""
    return {name for weight in quantized_weights(tensors) for name in weight.files}

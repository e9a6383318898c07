"""A quantized checkpoint seen as the plain one that it decodes to."""

from collections.abc import Mapping
from dataclasses import replace

from adapterkit.checkpoint.header import TensorSpec
from adapterkit.checkpoint.spec import Checkpoint
from adapterkit.errors import AdapterkitError, Damaged, Refused, refuse_all, shown
from adapterkit.registry import members
from adapterkit.weights.codec import CheckpointScan, QuantizedWeight
from adapterkit.weights.detect import (
    PACKED,
    check_not_quantized,
    quantization_evidence,
    without_quantization,
)


def decoded_view(base: Checkpoint) -> Checkpoint:
    """The checkpoint without quantization: each packed weight, a `QuantizedWeight`, in place of the tensors that hold it, and a config that
    says nothing of it; the same object where nothing is packed.

    `Refused` or `Damaged`, all at once, for formats that nobody here knows, missing siblings, shapes that do not fit, scales that
    are not finite.
    """
    if quantization_evidence(base.config, base.tensors) is None:
        return base
    settings = base.config.get("quantization_config")
    found = CheckpointScan(base, settings if isinstance(settings, dict) else {}, dict(base.tensors))
    packed: list[QuantizedWeight] = []
    for record in members("weights.codecs").values():
        for one in record.find(found):
            packed.append(one)
            for part in one.parts:
                found.tensors.pop(part.key, None)
    found.check_scales()
    found.errors += _twice(base, packed) + _left(found, packed)
    refuse_all(found.errors)
    homes = {one.parts[0].key: one for one in packed}
    tensors = {}
    for key, spec in base.tensors.items():
        if key in homes:
            tensors[homes[key].key] = homes[key]
        elif key in found.tensors:
            tensors[key] = spec
    known = {method for record in members("weights.codecs").values() for method in record.methods}
    plain = replace(
        base,
        tensors=tensors,
        config=without_quantization(base.config)
        if found.method in known and packed
        else base.config,
    )
    check_not_quantized(replace(plain, tensors=found.tensors))
    return plain


def _twice(base: Checkpoint, packed: list[QuantizedWeight]) -> list[AdapterkitError]:
    """Weights that are stored in two ways: as floats beside what is packed, or in two formats."""
    errors: list[AdapterkitError] = []
    seen: dict[str, str] = {}
    for one in packed:
        own = {part.key for part in one.parts}
        other = seen.get(one.key) or (
            one.key if one.key in base.tensors and one.key not in own else None
        )
        if other is not None:
            found = f"{shown(one.key)} as {shown(other)} and as {shown(one.parts[0].key)}"
            hint = "remove the tensors that are not part of the model"
            errors.append(Damaged(found, expected="each weight once", where=base.name, hint=hint))
        seen[one.key] = one.parts[0].key
    return errors


def _left(found: CheckpointScan, packed: list[QuantizedWeight]) -> list[AdapterkitError]:
    """What looks like codes among the tensors that no format took, in a checkpoint where others are taken."""
    errors: list[AdapterkitError] = []
    for key, spec in found.tensors.items() if packed and not found.errors else ():
        if (
            spec.dtype in ("U8", "I8", "I32", *PACKED)
            and len(spec.shape) > 1
            and not key.endswith("bias")
        ):  # old masks are so called
            text = f"{shown(key)}: {spec.dtype} {spec.shape} beside weights of {packed[0].name}"
            errors.append(
                Refused(
                    text,
                    expected="formats that are known",
                    where=found.base.name,
                    hint="dequantize it first",
                )
            )
    return errors


def quantized_weights(tensors: Mapping[str, TensorSpec]) -> list[QuantizedWeight]:
    """The quantized weights among tensors."""
    return [spec for spec in tensors.values() if isinstance(spec, QuantizedWeight)]


def quantization_files(tensors: Mapping[str, TensorSpec]) -> set[str]:
    """Names of files that say of these tensors that they are quantized, and mean nothing beside floats."""
    return {name for spec in quantized_weights(tensors) for name in spec.files}

"""A quantised checkpoint seen as the plain one that it decodes to, and the signs of formats that nobody here knows."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from adapterkit.checkpoint.header import TensorSpec
from adapterkit.checkpoint.spec import Checkpoint
from adapterkit.errors import AdapterkitError, Damaged, Refused, refuse_all, shown
from adapterkit.registry import members
from adapterkit.weights.packed import SAID, Found, Packed, without

SIBLINGS = {
    ".absmax": "bitsandbytes 4-bit",
    ".SCB": "bitsandbytes int8",
    ".weight_scale_inv": "block fp8",
    ".weight_scale": "compressed-tensors or fp8",
    ".weight_scales": "EETQ",
    ".weight_packed": "compressed-tensors packed",
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".W_q": "HQQ",
    ".codebooks": "AQLM",
    ".weight._data": "Quanto",
    "._weight_qdata": "torchao",
    ":qdata": "torchao",
}
PAIRS = {"_blocks": ("_scales", "MXFP4")}  # a common ending, telling only beside its fellow
PACKED = {"F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F6_E2M3", "F6_E3M2", "F4"}


def decoded(base: Checkpoint) -> Checkpoint:
    """The checkpoint without quantisation: each packed weight, a `Packed`, in place of the tensors that hold it, and a config that
    says nothing of it; the same object where nothing is packed.

    `Refused` or `Damaged`, all at once, for formats that nobody here knows, missing siblings, shapes that do not fit, scales that
    are not finite.
    """
    if not (_by_config(base.config) or _by_key(base.tensors) or _by_dtype(base.tensors)):
        return base
    settings = base.config.get("quantization_config")
    found = Found(base, settings if isinstance(settings, dict) else {}, dict(base.tensors))
    packed: list[Packed] = []
    for record in members("weights.codecs").values():
        for one in record.find(found):
            packed.append(one)
            for part in one.parts:
                found.tensors.pop(part.key, None)
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
    plain = replace(base, tensors=tensors, config=without(base.config) if found.method in known and packed else base.config)
    check_not_quantised(plain)
    return plain


def _twice(base: Checkpoint, packed: list[Packed]) -> list[AdapterkitError]:
    """Weights that are stored in two ways: as floats beside what is packed, or in two formats."""
    errors: list[AdapterkitError] = []
    seen: dict[str, str] = {}
    for one in packed:
        own = {part.key for part in one.parts}
        other = seen.get(one.key) or (one.key if one.key in base.tensors and one.key not in own else None)
        if other is not None:
            found = f"{shown(one.key)} as {shown(other)} and as {shown(one.parts[0].key)}"
            do = "remove the tensors that are not part of the model"
            errors.append(Damaged(found, expected="each weight once", where=base.name, do=do))
        seen[one.key] = one.parts[0].key
    return errors


def _left(found: Found, packed: list[Packed]) -> list[AdapterkitError]:
    """What looks like codes among the tensors that no format took, in a checkpoint where others are taken."""
    errors: list[AdapterkitError] = []
    for key, spec in found.tensors.items() if packed and not found.errors else ():
        if (
            spec.dtype in ("U8", "I8", "I32", *PACKED) and len(spec.shape) > 1 and not key.endswith("bias")
        ):  # old masks are so called
            text = f"{shown(key)}: {spec.dtype} {spec.shape} beside weights of {packed[0].name}"
            errors.append(Refused(text, expected="formats that are known", where=found.base.name, do="dequantise it first"))
    return errors


def packed_in(tensors: Mapping[str, TensorSpec]) -> list[Packed]:
    """The quantised weights among tensors."""
    return [spec for spec in tensors.values() if isinstance(spec, Packed)]


def check_not_quantised(base: Checkpoint) -> None:
    """`Refused` when weights are packed or scaled in a way that was not decoded: a delta added to their bytes would be silently
    wrong."""
    plain = {key: spec for key, spec in base.tensors.items() if not isinstance(spec, Packed)}
    found = _by_config(base.config) or _by_key(plain) or _by_dtype(plain)
    if found is None:
        return
    raise Refused(
        f"a quantised base: {found}",
        expected="bf16, fp16 or fp32 weights",
        where=base.name,
        do="merge into the 16-bit model it was made from, or dequantise it first",
    )


def _by_config(config: dict) -> str | None:
    """What a config says of quantisation, its sub-configs' included (a text model inside a vision model)."""
    for key in SAID:
        said: Any = config.get(key)
        if said is not None and said is not False:
            method = said.get("quant_method", "unnamed method") if isinstance(said, dict) else said
            return f"{key} ({shown(method)})"
    subs = (value for key, value in config.items() if key.endswith("_config") and isinstance(value, dict))
    return next(filter(None, map(_by_config, subs)), None)


def _by_key(tensors: Mapping[str, TensorSpec]) -> str | None:
    for key in tensors:
        for ending, kind in SIBLINGS.items():
            if key.endswith(ending):
                return f"{shown(key)} ({kind})"
        for ending, (fellow, kind) in PAIRS.items():
            if key.endswith(ending) and key.removesuffix(ending) + fellow in tensors:
                return f"{shown(key)} ({kind})"
    return None


def _by_dtype(tensors: Mapping[str, TensorSpec]) -> str | None:
    packed = next((spec for spec in tensors.values() if spec.dtype in PACKED), None)
    return f"{shown(packed.key)} in {packed.dtype}" if packed else None

"""Telling a quantized checkpoint from a plain one, by its config and by the scale tensors beside its weights."""

from collections.abc import Mapping
from typing import Any

from adapterkit.checkpoint.header import TensorSpec
from adapterkit.checkpoint.spec import Checkpoint
from adapterkit.errors import Refused, shown

CONFIG_KEYS = (
    "quantization_config",
    "compression_config",
    "quantization",
)  # transformers, older compressed-tensors, MLX
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


def check_not_quantized(base: Checkpoint) -> None:
    """`Refused` when weights are packed or scaled in a way that was not decoded: a delta added to their bytes would be silently
    wrong."""
    found = quantization_evidence(base.config, base.tensors)
    if found is None:
        return
    raise Refused(
        f"a quantized base: {found}",
        expected="bf16, fp16 or fp32 weights",
        where=base.name,
        hint="merge into the 16-bit model it was made from, or dequantize it first",
    )


def quantization_evidence(config: dict, tensors: Mapping[str, TensorSpec]) -> str | None:
    """What says that some weights are quantized, or None."""
    return _by_config(config) or _by_key(tensors) or _by_dtype(tensors)


def without_quantization(config: dict) -> dict[str, Any]:
    """A config, sub-configs included, that says nothing of quantization."""
    kept = {key: value for key, value in config.items() if key not in CONFIG_KEYS}
    return {
        k: without_quantization(v) if k.endswith("_config") and isinstance(v, dict) else v
        for k, v in kept.items()
    }


def _by_config(config: dict) -> str | None:
    """What a config says of quantization, its sub-configs' included (a text model inside a vision model)."""
    for key in CONFIG_KEYS:
        said: Any = config.get(key)
        if said is not None and said is not False:
            method = said.get("quant_method", "unnamed method") if isinstance(said, dict) else said
            return f"{key} ({shown(method)})"
    subs = (
        value
        for key, value in config.items()
        if key.endswith("_config") and isinstance(value, dict)
    )
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

"""Detect quantized checkpoints by their config and by scale tensors next to their weights."""

from collections.abc import Iterable, Mapping
from typing import Any

from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.checkpoint.spec import Checkpoint
from adapterkit.core.errors import Refused, shown
from adapterkit.core.records import Json

# of MLX, which writes the next one too; of transformers; of older compressed-tensors
CONFIG_KEYS = ("quantization", "quantization_config", "compression_config")
SIBLINGS = {
    ".absmax": "bitsandbytes 4-bit",
    ".SCB": "bitsandbytes int8",
    ".weight_scale_inv": "block fp8",
    ".weight_scale": "compressed-tensors, ComfyUI or fp8",
    ".weight_scales": "EETQ",
    ".comfy_quant": "ComfyUI",
    ".scale_weight": "ComfyUI's older fp8",
    ".weight_packed": "compressed-tensors packed",
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".W_q": "HQQ",
    ".codebooks": "AQLM",
    ".weight._data": "Quanto",
    "._weight_qdata": "torchao",
    ":qdata": "torchao",
}
QUANTIZED_METADATA = ("_quantization_metadata", "tensor_names")  # of ComfyUI, of torchao
PAIRS = {"_blocks": ("_scales", "MXFP4")}  # a common ending counts only with the other one
PACKED = {"F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F6_E2M3", "F6_E3M2", "F4"}


def check_not_quantized(base: Checkpoint, hint: str = "") -> None:
    """Refuse weights that are quantized and were not decoded, because adding a delta to their bytes
    would give silently wrong values."""
    evidence = quantization_evidence(base.config, base.tensors)
    if evidence is not None:
        from adapterkit.core.weights.unread import floats_hint

        raise Refused(
            f"this base is quantized: {evidence}",
            expected="bf16, fp16 or fp32 weights",
            where=base.name,
            hint=hint or floats_hint(base),
            code="AK404",
        )


def quantization_evidence(config: dict, tensors: Mapping[str, TensorSpec]) -> str | None:
    """The sign that some weights are quantized, or None."""
    if by_config := _by_config(config):
        return by_config
    for key in tensors:
        for ending, kind in SIBLINGS.items():
            if key.endswith(ending):
                return f"{shown(key)} ({kind})"
        for ending, (other, kind) in PAIRS.items():
            if key.endswith(ending) and key.removesuffix(ending) + other in tensors:
                return f"{shown(key)} ({kind})"
    packed = next((spec for spec in tensors.values() if spec.dtype in PACKED), None)
    return f"{shown(packed.key)} in {packed.dtype}" if packed else None


def without_quantization(config: dict) -> Json:
    """A config, with its sub-configs, without settings of quantization."""
    plain = {key: value for key, value in config.items() if key not in CONFIG_KEYS}
    return {
        key: without_quantization(value)
        if key.endswith("_config") and isinstance(value, dict)
        else value
        for key, value in plain.items()
    }


def is_of_comfyui(keys: Iterable[str], metadata: Mapping[str, str]) -> bool:
    """Return whether a file has ComfyUI's quantized weights, other than casts."""
    next_to = any(key.endswith((".comfy_quant", ".scale_weight")) for key in keys)
    return next_to or QUANTIZED_METADATA[0] in metadata


def metadata_of_floats(metadata: Mapping[str, str]) -> dict[str, str]:
    """A header's metadata without torchao's and ComfyUI's entries for quantized tensors."""
    is_quantized = lambda key, text: key in QUANTIZED_METADATA or '"_type"' in text
    return {key: text for key, text in metadata.items() if not is_quantized(key, text)} or {
        "format": "pt"
    }


def _by_config(config: dict) -> str | None:
    """A config's quantization setting, or that of a sub-config, such as a text model's."""
    for key in CONFIG_KEYS:
        value: Any = config.get(key)
        if value is not None and value is not False:
            unnamed = "mlx" if key == "quantization" else "unnamed method"
            method = value.get("quant_method", unnamed) if isinstance(value, dict) else value
            return f"{key} ({shown(method)})"
    parts = (v for k, v in config.items() if k.endswith("_config") and isinstance(v, dict))
    return next(filter(None, map(_by_config, parts)), None)

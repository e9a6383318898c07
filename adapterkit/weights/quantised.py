"""Telling a quantised checkpoint from a plain one, by its config and by the scale tensors beside its weights."""

from adapterkit.checkpoint.spec import Checkpoint
from adapterkit.errors import Refused, shown

SIBLINGS = {
    ".absmax": "bitsandbytes 4-bit",
    ".SCB": "bitsandbytes int8",
    ".weight_scale_inv": "block fp8",
    ".weight_scale": "compressed-tensors or fp8",
    ".weight_packed": "compressed-tensors packed",
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    "_blocks": "MXFP4",
    "._weight_qdata": "torchao",
    ":qdata": "torchao",
}
PACKED = {"F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F6_E2M3", "F6_E3M2", "F4"}


def check_not_quantised(base: Checkpoint) -> None:
    """`Refused` when the checkpoint's weights are packed or scaled: adding a delta to their bytes would be silently wrong."""
    said = base.config.get("quantization_config")
    method = said.get("quant_method", "unnamed method") if isinstance(said, dict) else None
    by_key = next(((k, v) for k in base.tensors for suffix, v in SIBLINGS.items() if k.endswith(suffix)), None)
    packed = next((s for s in base.tensors.values() if s.dtype in PACKED), None)
    if method is None and by_key is None and packed is None:
        return
    found = f"quantization_config ({shown(method)})" if method else ""
    if not found and by_key:
        found = f"{shown(by_key[0])} ({by_key[1]})"
    if not found and packed:
        found = f"{shown(packed.key)} in {packed.dtype}"
    raise Refused(
        f"a quantised base: {found}",
        expected="bf16, fp16 or fp32 weights",
        where=base.name,
        do="merge into the 16-bit model it was made from, or dequantise it first",
    )

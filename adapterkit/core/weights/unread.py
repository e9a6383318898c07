"""Advice for bases that are quantized where floats are needed. Only refusals load it."""

from adapterkit.core.checkpoint.spec import Checkpoint
from adapterkit.core.commands import command
from adapterkit.core.errors import shown
from adapterkit.core.registry import members


def floats_hint(base: Checkpoint) -> str:
    """Advise the dequantize command if a codec reads the config's method."""
    settings = base.config.get("quantization_config")
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    if isinstance(method, str) and method.lower() not in read_methods():
        return unread_hint(method)
    out = "floats" if getattr(base.folder, "single", None) is None else "floats.safetensors"
    dequantize = command("adapterkit dequantize", base.folder.label, out=out)
    return f"give the 16-bit model that it was made from, or dequantize it first\n{dequantize}"


def unread_hint(method: str) -> str:
    """Advise what to do with a base that no codec reads."""
    known = read_methods()
    if method.lower() in known:
        return f"restore the base and its config: no weights are stored as {shown(method)}"
    methods = ", ".join(sorted(known))
    return f"give the 16-bit model that it was made from; these methods are read: {methods}"


def read_methods() -> set[str]:
    """The values of a config's quant_method that codecs read."""
    return {method for codec in members("codecs").values() for method in codec.methods}

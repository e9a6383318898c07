"""Models that mlx-lm quantized, and what mlx makes of a weight in their formats."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.support.mlx_models import TOKENS, saved

MODES = {"mxfp4": (4, 32), "nvfp4": (4, 16), "mxfp8": (8, 32)}
WIDE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}


def quantized(
    folder: Path,
    out: Path,
    bits: int = 4,
    size: int = 64,
    mode: str = "affine",
    own: dict[str, Any] | None = None,
    dtype: str = "float32",
) -> Path:
    """A model as `mlx_lm.convert` quantizes and saves it; `own`: settings of modules by the ends of
    their paths."""
    import mlx.core as mx
    from mlx.utils import tree_map
    from mlx_lm.utils import load_model, quantize_model, save_config, save_model

    model, config = load_model(folder)
    model.update(tree_map(lambda p: p.astype(getattr(mx, dtype)), model.parameters()))

    def chosen(path: str, _: Any) -> Any:
        return next((own[end] for end in own or {} if path.endswith(end)), True)

    bits, size = MODES.get(mode, (bits, size))
    predicate: Any = chosen if own else None
    model, config = quantize_model(model, config, size, bits, mode, quant_predicate=predicate)
    save_model(out, model)
    save_config(config | {"dtype": dtype, "torch_dtype": dtype}, out / "config.json")
    return out


def base(place: Path, kind: str = "llama", sizes: dict[str, Any] | None = None, **how: Any) -> Path:
    """The folder of a quantized model of random weights."""
    return quantized(saved(kind, place / "floats", **WIDE | (sizes or {})), place / "base", **how)


def array(x: Tensor) -> Any:
    """mlx's array of a tensor."""
    import mlx.core as mx

    if x.dtype == torch.bfloat16:
        return mx.array(x.float().numpy()).astype(mx.bfloat16)
    return mx.array(x.numpy())


def tensor(x: Any) -> Tensor:
    """The tensor of mlx's array of floats, in float32."""
    import mlx.core as mx
    import numpy as np

    return torch.from_numpy(np.array(x.astype(mx.float32)))


def by_mlx(w: Tensor, settings: dict[str, Any], dtype: str) -> Tensor:
    """What mlx's own quantization of a weight decodes to, in float32."""
    import mlx.core as mx

    parts = mx.quantize(array(w.float()).astype(getattr(mx, dtype)), **settings)
    if settings.get("mode", "affine") == "affine":
        parts = [parts[0], *(one.astype(mx.float32) for one in parts[1:])]
    return tensor(mx.dequantize(*parts, **settings))


def scales_of(w: Tensor, settings: dict[str, Any]) -> Tensor:
    """The scales of a mode without biases, by mlx."""
    import mlx.core as mx

    return torch.tensor(mx.quantize(array(w), **settings)[1].tolist(), dtype=torch.uint8)


def settings_of(folder: Path, module: str) -> dict[str, Any]:
    """The settings of one module's weight in config.json."""
    settings = json.loads((folder / "config.json").read_text())["quantization"]
    own = settings.get(module, True)
    chosen = settings if own is True else own
    return {key: chosen[key] for key in ("bits", "group_size", "mode") if key in chosen}


def computed(folder: Path, adapter: Path | None = None) -> Tensor:
    """The logits of mlx-lm with all floats in 32 bits, with an adapter that it loads itself."""
    import mlx.core as mx
    from mlx.utils import tree_map
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    model: Any = load_model(folder)[0]
    wide = lambda p: p.astype(mx.float32) if mx.issubdtype(p.dtype, mx.floating) else p
    model.update(tree_map(wide, model.parameters()))
    if adapter is not None:
        model = load_adapters(model, str(adapter))
        model.eval()
    return tensor(model(mx.array(TOKENS.numpy()))[0])


def fused(folder: Path, adapter: Path) -> dict[str, Tensor]:
    """The weights of the modules of an adapter after mlx_lm.fuse, decoded in float32."""
    import mlx.core as mx
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    model: Any = load_adapters(load_model(folder)[0], str(adapter))
    result = {}
    for name, module in model.named_modules():
        if hasattr(module, "fuse"):
            one = module.fuse()
            parts = (one.weight, one.scales, one.biases)
            weight = mx.dequantize(*parts, group_size=one.group_size, bits=one.bits, mode=one.mode)
            result[name] = tensor(weight)
    return result

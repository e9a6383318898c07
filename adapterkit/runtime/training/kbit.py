"""What training on a quantized base needs."""

from typing import Any

import torch
from torch import nn

from adapterkit.errors import Refused
from adapterkit.runtime.quantized import quantization_of
from adapterkit.runtime.site import CHILD

BITSANDBYTES = ("Linear4bit", "Linear8bitLt")


def prepare_for_kbit_training(
    model: nn.Module,
    *,
    gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
) -> nn.Module:
    """Make a base ready for QLoRA (arXiv:2305.14314), in place: parameters are frozen, those in 16
    bits become float32, and, where layers are quantized, checkpoints save memory.

    Layers of bitsandbytes cast what they are given, and those of other tools do not: with these
    all parameters keep their dtype. Adapters that are there already stay as they are. `Refused` for
    a model that has no checkpointing. Unlike PEFT's prepare_model_for_kbit_training, checkpoints
    are not reentrant unless the keywords say so."""
    layers = [known for known in map(quantization_of, model.modules()) if known is not None]
    transformer: Any = model
    # its name before transformers 5.24
    old = getattr(model, "gradient_checkpointing_enable", None)
    enable = getattr(model, "activation_checkpointing_enable", old)
    is_able = enable is not None and transformer.supports_gradient_checkpointing
    if layers and gradient_checkpointing and not is_able:
        raise Refused(
            f"{type(model).__name__} has no gradient checkpointing",
            expected="a model of transformers that has",
            where="prepare_for_kbit_training",
            hint="give gradient_checkpointing=False",
        )
    widens = _method(model) in (None, "bitsandbytes") and all(
        known.matches in BITSANDBYTES for known in layers
    )
    adapters = {id(p) for path, p in model.named_parameters() if CHILD in path.split(".")}
    for parameter in model.parameters():
        if id(parameter) in adapters:
            continue
        parameter.requires_grad_(False)
        narrow = parameter.dtype in (torch.float16, torch.bfloat16)
        if narrow and widens and not hasattr(parameter, "quant_state"):
            parameter.data = parameter.data.to(torch.float32)
    if layers and gradient_checkpointing and enable is not None:
        transformer.enable_input_require_grads()
        enable(gradient_checkpointing_kwargs or {"use_reentrant": False})
    return model


def _method(model: nn.Module) -> str | None:
    """The tool that transformers says quantized the model."""
    method = getattr(model, "quantization_method", None)
    return None if method is None else str(getattr(method, "value", method))

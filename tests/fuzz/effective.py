"""What PEFT's forward does with each module, in float64, beside what the module of a written
checkpoint does.

The weights are not taken from PEFT's merge but from its layers' outputs: a linear layer is asked
for the rows of the identity, an embedding for every token, a convolution for an impulse in every
channel. Experts' stacks and attention's fused projections, whose layers cannot be asked alone, are
their stored value plus PEFT's delta; the whole model's outputs stand behind those.
"""

import peft
import torch
import transformers
from peft.tuners.lora import layer as peft_layers
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from tests.support.oracle import quiet

from . import models
from .adapters import CONV, LINEAR

WRAPPERS = (BaseTunerLayer, AuxiliaryTrainingWrapper)


FLOOR = 2.0**-20  # of a tensor's largest value: what float32 sums may be off by


@torch.no_grad()
def differences(
    expected: nn.Module, actual: nn.Module, plain: transformers.PreTrainedModel, step: float
) -> tuple[list[str], bool]:
    """Modules of `found` that do not do what those of `expected` do, with the error, all in
    float64; and whether the whole models' outputs could be compared.

    Both are PEFT models or plain ones, `plain` the model without adapters. `step`: the error
    allowed, relative to each value: half the distance of two neighbors of the written dtype.
    """
    expected, actual, plain = expected.double(), actual.double(), plain.double()
    roots = [m.base_model.model if isinstance(m, peft.PeftModel) else m for m in (expected, actual)]
    wrong = []
    for name, module in plain.named_modules():
        parent = plain.get_submodule(name.rpartition(".")[0])
        if isinstance(parent, nn.MultiheadAttention) or not list(module.parameters(recurse=False)):
            continue  # an output projection is compared with its attention
        if any(_inside_wrapper(root, name) for root in roots):
            continue
        pair = [root.get_submodule(name) for root in roots]
        ask = _parameters if any(_by_parameter(one, module) for one in pair) else _answers
        answers, results = (ask(one, module) for one in pair)
        for key, answer in answers.items():
            error = _error(results.get(key), answer, step)
            if error > 1:
                wrong.append(f"{name}.{key}: {error:.3g} times the allowed error")
    if any(map(ignored, (*expected.modules(), *actual.modules()))):
        return wrong, False
    outputs, results = models.outputs(expected, plain), models.outputs(actual, plain)
    for key, output in (outputs or {}).items():
        result = (results or {}).get(key)
        # masked scores, and models that random weights drive to infinity
        if not bool(output.isfinite().all()):
            continue
        if result is None or output.shape != result.shape:
            wrong.append(f"output {key} is missing")
        elif not torch.allclose(
            output, result, rtol=0, atol=(1e-3 + 60 * step) * (1e-3 + float(output.abs().max()))
        ):
            wrong.append(
                f"output {key}: {float((output - result).abs().max() / output.abs().max()):.3g}"
            )
    return wrong, outputs is not None


def _inside_wrapper(root: nn.Module, name: str) -> bool:
    """Whether PEFT wraps a module only together with the one around it (attention's out_proj)."""
    try:
        root.get_submodule(name)
    except AttributeError:
        return True
    return False


def ignored(module: nn.Module) -> bool:
    """Whether PEFT adapts attention's output projection without the attention, whose forward then
    goes past the adapter."""
    return isinstance(module, nn.MultiheadAttention) and isinstance(
        module.out_proj, peft_layers.Linear
    )


def _by_parameter(module: nn.Module, plain: nn.Module) -> bool:
    """Whether a layer cannot be asked alone: PEFT acts on its parameters, or its forward is the
    model's own."""
    layers = []
    while isinstance(module, WRAPPERS):
        layers.append(module)
        module = module.base_layer if isinstance(module, BaseTunerLayer) else module.original_module
    if getattr(plain, "groups", 1) > 1 and not layers:
        return True  # slow to ask, channel by channel
    known = (
        nn.Linear.forward,
        transformers.pytorch_utils.Conv1D.forward,
        nn.Embedding.forward,
        *(cls.forward for cls in CONV),
    )
    return (
        any(isinstance(layer, peft_layers.ParamWrapper) for layer in layers)
        or type(plain).forward not in known
    )


def _answers(module: nn.Module, plain: nn.Module) -> dict[str, Tensor]:
    """What a layer gives for the rows of the identity and for zero, for each token, or for an
    impulse in each channel."""
    if isinstance(plain, LINEAR):
        inputs = plain.in_features if isinstance(plain, nn.Linear) else plain.weight.shape[0]
        zero = module(torch.zeros(1, inputs, dtype=torch.float64))
        return {"weight": module(torch.eye(inputs, dtype=torch.float64)) - zero, "bias": zero}
    if isinstance(plain, nn.Embedding):
        return {"weight": module(torch.arange(plain.num_embeddings))}
    return _impulses(module, plain)


def _impulses(module: nn.Module, plain: nn.Module) -> dict[str, Tensor]:
    channels = plain.in_channels
    size = [2 * (d * (k - 1) + 1) for d, k in zip(plain.dilation, plain.kernel_size, strict=True)]
    zero = torch.zeros(1, channels, *size, dtype=torch.float64)
    bias, middle = module(zero), tuple(n // 2 for n in size)
    actual = []
    for first in range(0, channels, 64):
        count = min(64, channels - first)
        impulses = zero.repeat(count, *[1] * (zero.dim() - 1))
        for i in range(count):
            impulses[(i, first + i, *middle)] = 1.0
        actual.append(module(impulses) - bias)
    return {"weight": torch.cat(actual), "bias": bias}


def _parameters(module: nn.Module, plain: nn.Module) -> dict[str, Tensor]:
    """The effective value of each of a module's own parameters."""
    layers = []
    while isinstance(module, WRAPPERS):
        layers.append(module)
        if isinstance(module, AuxiliaryTrainingWrapper):
            active = [
                a for a in module.active_adapters if a in getattr(module, "modules_to_save", {})
            ]
            module = module.modules_to_save[active[0]] if active else module.original_module
        else:
            module = module.base_layer
    actual = {n: p.detach().clone() for n, p in module.named_parameters(recurse=False)}
    if any(any(getattr(layer, "use_dora", {}).values()) for layer in layers):
        # PEFT's delta leaves the magnitude out, and a layer with a forward of its own cannot be
        # asked for it
        return {}
    for layer in layers:
        if isinstance(layer, AuxiliaryTrainingWrapper):
            continue
        leaf = getattr(layer, "parameter_name", None)
        leaf = leaf or (
            "in_proj_weight" if isinstance(layer, peft_layers.MultiheadAttention) else "weight"
        )
        for adapter in layer.active_adapters:
            if adapter in layer.scaling:
                with quiet():
                    actual[leaf] = actual[leaf] + layer.get_delta_weight(adapter).reshape(
                        actual[leaf].shape
                    )
    if isinstance(module, nn.MultiheadAttention):
        actual |= _out_proj(module)
    return actual


def _out_proj(module: nn.MultiheadAttention) -> dict[str, Tensor]:
    layer = module.out_proj
    adapted = isinstance(layer, BaseTunerLayer)
    base = layer.get_base_layer() if adapted else layer
    weight = base.weight.detach().clone()
    for adapter in layer.active_adapters if adapted else ():
        if adapter in layer.scaling:
            weight = weight + layer.get_delta_weight(adapter)
    return {"out_proj.weight": weight, "out_proj.bias": base.bias.detach()}


def _error(actual: Tensor | None, expected: Tensor, step: float) -> float:
    """The largest difference, as a multiple of what rounding to the written dtype allows."""
    if actual is None or actual.shape != expected.shape:
        return float("inf")
    if not expected.numel():
        return 0.0
    allowed = 1.02 * step * expected.abs() + FLOOR * float(expected.abs().max()) + 1e-12
    return float(((actual - expected).abs() / allowed).max())

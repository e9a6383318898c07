"""Why factors on a live module would not do as its weight does."""

from collections.abc import Mapping

from torch import nn

from adapterkit.adapters.lora_config import LoraConfig
from adapterkit.adapters.resolve import model_type
from adapterkit.errors import Refused, shown
from adapterkit.runtime.quantized import quantization_of
from adapterkit.weights.bypassed import MAMBAS, MAMBAS_REFUSED, looks_up_otherwise, reads_weight
from adapterkit.weights.linear import kind_of

WHERE = "LoraConfig"


def unread(model: nn.Module, modules: Mapping[str, nn.Module], path: str) -> Refused | None:
    """Why factors and rows, which act on a module's output, would not do as its weight does: the
    code around it reads that and does not call the module, or an embedding's forward is its own;
    None if they do."""
    if looks_up_otherwise(type(modules[path]).__mro__):
        return Refused(
            f"{shown(path)} is a {type(modules[path]).__name__}, with a forward of its own",
            expected="embeddings that give rows of their weight, or multiples",
            where=WHERE,
            hint="leave it out; modules_to_save trains it whole",
        )
    reader = weight_reader(model, modules, path)
    if reader is None:
        return None
    hint = "leave it out; modules_to_save trains it whole"
    if kind_of(modules.get(path.rpartition(".")[0], model)) == "attention":
        hint = "target the attention: both projections get factors"
    return Refused(
        f"the weight of {shown(path)} is read by {reader}, not by its forward",
        expected="layers that are called",
        where=WHERE,
        hint=hint,
    )


def weight_reader(model: nn.Module, modules: Mapping[str, nn.Module], path: str) -> str | None:
    """The class around a module that multiplies by the module's weight itself; None if it calls the
    module."""
    parent, _, leaf = path.rpartition(".")
    around = type(modules.get(parent, model))
    is_mamba = model_type(model) in MAMBAS and leaf in MAMBAS_REFUSED
    return around.__name__ if is_mamba or reads_weight(around.__mro__, leaf) else None


def unfit_as_parameter(path: str, host: nn.Module, config: LoraConfig) -> Refused | None:
    """Why PEFT cannot have the factors of a linear layer as those of its weight, as a file has them
    where PEFT takes the layer's name for a stack of experts; None if it can."""
    settings = ("dora", "lora_bias", "invocation_tokens")
    wrong = [name for name in settings if getattr(config, name)]
    if quantization_of(host) is not None:
        wrong.append(f"a quantized weight ({type(host).__name__})")
    if not wrong:
        return None
    return Refused(
        f"{' and '.join(wrong)} on {shown(path)}, which PEFT takes for a stack of experts",
        expected="plain factors, which a file has as those of the layer's weight",
        where=WHERE,
        hint="exclude the layer, or remove the setting",
    )

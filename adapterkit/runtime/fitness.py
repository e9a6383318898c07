"""Targets on a live model, and why a module or parameter is none."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from adapterkit.adapters.lora_config import LoraConfig
from adapterkit.adapters.targets import is_within
from adapterkit.errors import Refused, shown
from adapterkit.runtime.layers import kind_of
from adapterkit.runtime.quantized import quantization_of
from adapterkit.weights.bypassed import MAMBAS, MAMBAS_REFUSED, looks_up_otherwise, reads_weight

WHERE = "LoraConfig"


@dataclass(frozen=True)
class Target:
    """A module that gets factors, or its parameter `leaf`; scale = alpha / rank, or alpha / √rank.

    `tied`: the embedding whose factors a head shares, transposed."""

    path: str
    module: nn.Module
    kind: str
    rank: int
    scale: float
    leaf: str | None = None
    tied: str | None = None

    @property
    def name(self) -> str:
        """Of the module or parameter: what patterns match."""
        return self.path if self.leaf is None else f"{self.path}.{self.leaf}"


def model_type(model: nn.Module) -> str | None:
    """The type of a transformers model."""
    return getattr(getattr(model, "config", None), "model_type", None)


def unfit_module(model: nn.Module, modules: Mapping[str, nn.Module], path: str) -> Refused | None:
    """Why a module takes no factors; None if it does."""
    module = modules[path]
    problem = f"target {shown(path)} is a {type(module).__name__}"
    expected = "a linear layer, an embedding, a convolution or torch's MultiheadAttention"
    hint = "exclude it from targets"
    if kind_of(module) is None:
        leaves = [leaf for leaf, p in module.named_parameters(recurse=False) if p.dim() in (2, 3)]
        if leaves:
            name = f"{path.rpartition('.')[2]}.{leaves[0]}"
            hint = f"parameters={[name]!r} adapts the parameter itself"
        elif any(kind_of(child) for child in module.modules()):
            hint = "target the layers inside it"
    else:
        return unread(model, modules, path)
    return Refused(problem, expected=expected, where=WHERE, hint=hint)


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


def unfit_settings(target: Target, config: LoraConfig) -> Iterator[Refused]:
    """Settings that a target's kind does not take."""
    kind, module = target.kind, target.module

    def unfit(setting: str, expected: str) -> Refused:
        problem = f"{setting} on {shown(target.name)}, a {type(module).__name__}"
        hint = "exclude the module, or remove the setting"
        return Refused(problem, expected=expected, where=WHERE, hint=hint)

    if config.dora and kind == "attention":
        yield unfit("dora", "a linear layer, an embedding or a convolution")
    if target.tied is not None and (config.dora or kind != "linear"):
        yield unfit("dora with tie" if config.dora else "tie", "a linear head without dora")
    if config.invocation_tokens and kind not in ("linear", "conv1d"):
        yield unfit("invocation_tokens", "linear layers")
    if config.lora_bias and kind in ("embedding", "attention"):
        yield unfit("lora_bias", "a linear layer or a convolution")
    groups = getattr(module, "groups", 1) if kind == "conv" else 1
    if target.rank % groups:
        yield unfit(f"rank {target.rank}", f"a multiple of the {groups} groups")
    if kind == "attention" and not getattr(module, "_qkv_same_embed_dim", True):
        yield unfit("factors", "one width of queries, keys and values")


def unfit_parameter(
    path: str, name: str, parameter: nn.Parameter, config: LoraConfig
) -> Refused | None:
    """Why a parameter takes no factors; None if it does."""
    problem, hint = f"parameter {shown(name)}", "remove it from parameters"
    shape = tuple(parameter.shape)
    if path == "":
        problem, hint = f"{problem} of the model itself", "put the model into another module"
    elif len(shape) not in (2, 3) or not parameter.is_floating_point():
        problem = f"{problem} with shape {shape}, {parameter.dtype}"
    elif entry := next((one for one in config.saved if is_within(path, one)), None):
        problem = f"{problem} inside {shown(entry)}, which is trained in full"
    else:
        return None
    return Refused(
        problem, expected="2 or 3 dimensions of floats, in a module", where=WHERE, hint=hint
    )

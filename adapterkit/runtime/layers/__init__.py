"""The kinds of layers that take factors: each is a class in its own file, which implements the
runtime's interface `FactorsPatch`."""

import importlib
import pkgutil

from torch import nn

from adapterkit.core.errors import Refused
from adapterkit.core.weights.layers import kind_of as stored_kind_of
from adapterkit.runtime.layers.alora import INVOKED
from adapterkit.runtime.patches.factors import FactorsPatch
from adapterkit.verbs.shared.lora_config import LoraConfig

KINDS: dict[str, type[FactorsPatch]] = {
    patch.kind: patch
    for module in pkgutil.iter_modules(__path__)
    for patch in vars(importlib.import_module(f"{__name__}.{module.name}")).values()
    if isinstance(patch, type) and issubclass(patch, FactorsPatch) and "kind" in vars(patch)
}


def kind_of(host: nn.Module) -> type[FactorsPatch] | None:
    """The kind of a layer, None if it takes no factors."""
    if (known := stored_kind_of(host)) is not None:
        return KINDS[known]
    return next((patch for patch in KINDS.values() if patch.matches(host)), None)


def patch_class(kind: type[FactorsPatch], config: LoraConfig) -> type[FactorsPatch]:
    """The class of an adapter's patches on layers of a kind; `Refused` if an aLoRA cannot act."""
    if not config.invocation_tokens:
        return kind
    if kind not in INVOKED:
        raise Refused(
            f"an activated LoRA cannot act on {kind.kind} layers",
            expected="linear layers",
            where="targets",
            hint="exclude them from targets",
            code="AK801",
        )
    return INVOKED[kind]

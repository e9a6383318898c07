"""Train and run PyTorch models with adapters, while the base's own values never change."""

from adapterkit.core.libraries import hush
from adapterkit.runtime.handle import Adapters, attach, create_arrow_model, load, load_arrow
from adapterkit.runtime.quantized import register_quantized
from adapterkit.runtime.training.collection import collect
from adapterkit.runtime.training.optimizers import LoraFA, Riemannian, loraplus
from adapterkit.runtime.training.trainer import prepare_for_kbit_training

__all__ = [
    "Adapters",
    "LoraFA",
    "Riemannian",
    "attach",
    "collect",
    "create_arrow_model",
    "load",
    "load_arrow",
    "loraplus",
    "prepare_for_kbit_training",
    "register_quantized",
]
hush()

"""The runtime: train and run PyTorch models with adapters, beside the base and never inside it."""

from adapterkit.runtime.arrow_model import create_arrow_model, load_arrow
from adapterkit.runtime.collection import collect
from adapterkit.runtime.handle import Adapters, attach, load
from adapterkit.runtime.kbit import prepare_for_kbit_training
from adapterkit.runtime.optimizers import LoraFA, Riemannian, loraplus
from adapterkit.runtime.quantized import register_quantized

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

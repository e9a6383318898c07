"""The runtime: train and run PyTorch models with adapters, beside the base and never inside it."""

from adapterkit.runtime.handle import Adapters, attach, load

__all__ = ["Adapters", "attach", "load"]

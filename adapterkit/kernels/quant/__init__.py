"""Quantized formats: values and codes as tensors, and rounding to them."""

from adapterkit.core.lazy import submodules

__getattr__ = submodules(__name__)

"""Quantized formats, and what rounds to them: values and codes, as tensors."""

from adapterkit.core.lazy import submodules

__getattr__ = submodules(__name__)

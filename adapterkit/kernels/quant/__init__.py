"""Quantized formats, and what rounds to them: values and codes, as tensors."""

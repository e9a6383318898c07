"""Bytes: what a checkpoint's headers say, and reading and writing its tensors. Nothing here knows
what a tensor means."""

"""Checkpoints as bytes: parse their headers, and read and write their tensors. Nothing here knows
the meaning of a tensor."""

"""Adapters in other layouts than PEFT's: formats described in TOML files, and their interpreter.

`detect` and `read` turn a file into `modules.record.Contents`: modules with expressions of their
tensors. `write` turns these into a file in another format. `core/adapter/` reads and writes PEFT's
own layout, through `peft/`.
"""

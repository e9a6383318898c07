"""Adapters in other layouts than PEFT's: formats described in TOML files, and their interpreter.

A file is read (`detect`, `read`) into `modules.record.Contents`, modules with expressions of their
tensors, and these are written (`write`) as a file in another format. PEFT's own layout is read and
written by `core/adapter/`, through `peft/`.
"""

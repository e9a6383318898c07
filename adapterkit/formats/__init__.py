"""Adapters in other layouts than PEFT's: formats described in TOML files, and their interpreter."""

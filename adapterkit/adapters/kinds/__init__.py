"""Kinds of adapters besides LoRA: one file each."""

"""The neutral adapter, PEFT's layout on disk, factors, and the kinds besides LoRA."""

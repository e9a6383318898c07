"""The neutral adapter, PEFT's layout on disk, factors, and the types besides LoRA."""

"""Types of adapters besides LoRA: one file each."""

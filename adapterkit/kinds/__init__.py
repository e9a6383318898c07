"""Types of adapters other than LoRA, as deltas: one file for each, its record named as PEFT's type is."""

"""PEFT's layout as one of the formats, and the dialects of its readers."""

"""GGUF model files, read as the checkpoints that they decode to."""

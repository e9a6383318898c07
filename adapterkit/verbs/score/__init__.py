"""Measure checkpoints on texts, without loading a model."""

"""Adapters onto a live model, made or read, and back to disk."""

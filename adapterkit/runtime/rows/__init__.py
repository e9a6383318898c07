"""Adapters by rows of a batch."""

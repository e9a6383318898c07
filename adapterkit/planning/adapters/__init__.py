"""Adapters as they act on a base: joined, compared, as deltas."""

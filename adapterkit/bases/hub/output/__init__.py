"""Outputs on the Hub, made on bounded disk."""

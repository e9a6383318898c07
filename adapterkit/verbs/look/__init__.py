"""Measurements of the read-only verbs as plain dicts, with their tables and pictures."""

"""Measurements of the read-only verbs as plain dicts, and their tables and pictures."""

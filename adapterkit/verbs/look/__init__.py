"""Measurements of the read-only verbs as plain dicts; tables and pictures of them."""

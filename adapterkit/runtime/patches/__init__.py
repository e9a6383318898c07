"""Patches that act at modules of any kind: factors, copies, rows of tokens, DoRA."""

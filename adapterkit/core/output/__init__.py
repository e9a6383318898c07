"""Output folders: written whole or not at all, one process at a time, resumable."""

"""Output folders: complete or absent, written by one process at a time, resumable."""

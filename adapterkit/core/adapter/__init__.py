"""The neutral adapter, its factors, and PEFT's layout on disk."""

"""Which modules an option means."""

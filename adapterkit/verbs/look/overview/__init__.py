"""report: several adapters and an outcome, as numbers and as one page."""

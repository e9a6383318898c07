"""report: several adapters and a result, as numbers and as one page."""

"""The data: samples, their tokens, and which of these count."""

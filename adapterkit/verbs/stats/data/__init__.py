"""Data: samples, their tokens, and masks of the tokens that count."""

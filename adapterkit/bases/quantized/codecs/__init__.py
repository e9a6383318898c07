"""Formats of quantized weights: each is a record of one weight, found from the files and config.
One module defines one format."""

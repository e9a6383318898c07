"""Formats of quantized weights: each a record of one weight, found by what its files and config
say. One file is one format."""

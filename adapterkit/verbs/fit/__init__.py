"""Weights of adapters chosen by data: the model runs with all of them, and their weights get
gradients."""

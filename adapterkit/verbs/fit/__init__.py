"""Weights of adapters chosen by data: the model runs with all adapters, and only their weights get
gradients."""

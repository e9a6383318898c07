"""What is wrong with a model, or with an adapter for an engine."""

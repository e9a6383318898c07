"""Adapters to changes of parameters, and these to steps on stored tensors."""

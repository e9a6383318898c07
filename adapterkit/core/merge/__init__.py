"""Turn adapters into changes of parameters, and these into steps on stored tensors."""

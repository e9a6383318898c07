"""Ways to combine deltas: a method is a file with a frozen record whose fields are its options."""

# PEFT's name of a combination -> method, rank of the result without --rank and --energy
ALIASES = {
    "svd": ("linear", "largest"),
    "cat": ("linear", "exact"),
    "ties_svd": ("ties", "largest"),
    "dare_linear_svd": ("dare_linear", "largest"),
    "dare_ties_svd": ("dare_ties", "largest"),
    "magnitude_prune_svd": ("magnitude_prune", "largest"),
}

"""Map the loaded model's parameters to stored tensors: which tensor, slice and orientation."""

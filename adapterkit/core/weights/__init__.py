"""What stored bytes mean: which stored tensors hold a parameter of the loaded model, which slice of
it, in which orientation."""

"""Ways to combine deltas: a method is a file with a frozen record whose fields are its options."""

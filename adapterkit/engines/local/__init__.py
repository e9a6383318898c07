"""One machine: threads that read, compute and write, on CPU or GPU."""

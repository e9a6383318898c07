"""Several processes that write one output together."""

"""Put new or stored adapters onto a live model, and write them to disk."""

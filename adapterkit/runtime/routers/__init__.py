"""Arrow routers on a live model."""

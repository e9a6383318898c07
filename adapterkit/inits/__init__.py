"""Ways to initialize an adapter from its base's weights: a method is a file with a frozen record
whose fields are its options; `name` is what users type."""

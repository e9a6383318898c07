"""Ways to initialise an adapter from its base's weights. One file is one method; `name` is what users type."""

"""Plan the conversion of an adapter from the layout of one tool into that of another."""

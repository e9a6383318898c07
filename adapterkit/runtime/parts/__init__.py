"""What acts at a module of any kind: factors, copies, rows of tokens, DoRA."""

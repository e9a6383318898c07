"""What acts at a module: factors, copies, rows of tokens, DoRA, aLoRA."""

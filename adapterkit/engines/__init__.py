"""Where a plan's steps run."""

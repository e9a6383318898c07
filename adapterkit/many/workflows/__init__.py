"""Jobs of more than one call: pipelines, plan files, workers."""

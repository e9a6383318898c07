"""Jobs beyond one call: pipelines, plans as files, workers."""

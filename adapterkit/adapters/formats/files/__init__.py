"""Read and write the files of a format: containers, keys, configs, metadata."""

"""What the files of a format say: containers, keys, configs, metadata."""

"""Create the folders that a job writes: adapters, models, and the files next to the weights."""

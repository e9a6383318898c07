"""The folders that a job writes: adapters, models, and the files beside the weights."""

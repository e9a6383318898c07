"""What a base can be besides a model of safetensors; `inputs/model_checkpoint.py` is the door."""

"""Run the model one layer at a time."""

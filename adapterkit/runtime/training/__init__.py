"""Optimizers, trainers' hooks and statistics for training."""

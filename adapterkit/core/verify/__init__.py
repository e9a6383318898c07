"""Checks of an output against its receipt and its inputs."""

"""Computations as frozen records that pickle: edits of rows, and tasks, which compute one output
each."""

"""Pure tensor mathematics: no file, name, config, device policy or logging."""

"""What the suites share: models, references, files of every format, a Hub."""

"""Open the folders that a job reads, and identify their files."""

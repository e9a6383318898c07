"""The folders that a job reads, and what identifies their files."""

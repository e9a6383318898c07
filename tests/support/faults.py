"""What the suites of faults share."""

import os

import pytest

WRITING = ["pwrite", "write", "copy_file_range", "fallocate", "ftruncate"]
root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: it mounts file systems")


def check_failure(bench, whole, *words: str, ended=None, resumes: bool = True) -> None:
    """After a failure: a message, nothing published, and a run that resumes."""
    ended.failed_cleanly(*words)
    assert not bench.out.exists()
    bench.check_stage(whole)
    if resumes:
        bench.merge("--resume").succeeded()
        bench.check_done(whole)

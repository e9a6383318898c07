"""The example of formats runs, and each program that is installed predicts what PEFT does."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.slow
def test_formats(tmp_path):
    words = [tmp_path / "out", "--steps", "2", "--prompts", "1"]
    done = subprocess.run(
        [sys.executable, EXAMPLES / "formats.py", *map(str, words)],
        capture_output=True,
        text=True,
        cwd=EXAMPLES,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "| PEFT, through GGUF |" in done.stdout

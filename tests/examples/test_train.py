"""Training a real model with the runtime, as examples/train.py does it, in a short form."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_training_example_runs_and_what_must_hold_holds(tmp_path):
    command = [sys.executable, str(ROOT / "examples" / "train.py"), str(tmp_path), "--steps", "2"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    # PEFT's losses, rows, what each language learned, the merged files
    assert done.stdout.count("\nok: ") == 1 + 1 + 3 + 1
    assert "WRONG" not in done.stdout

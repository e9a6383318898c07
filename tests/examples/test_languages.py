"""Adapter algebra on adapters that were really trained, as examples/languages.py does it."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_languages_example_runs_and_what_must_hold_holds(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "languages.py"), str(tmp_path / "out")],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("\nok: ") == 8 + 3 + 2  # loaded by PEFT, learned, exact
    assert "WRONG" not in done.stdout

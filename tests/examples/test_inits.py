"""Training from every initialization on a real model, cut short, as examples/inits.py does it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_example_of_inits_runs_and_starts_at_the_base(tmp_path):
    words = [str(tmp_path), "--steps", "2", "--layers", "2"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "inits.py"), *words],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\nok: " in done.stdout and done.stdout.count("\n| ") == 1 + 7
    curves = json.loads((tmp_path / "losses.json").read_text())["training"]
    assert len(curves) == 7 and {len(curve) for curve in curves.values()} == {2}
    first = [curve[0] for curve in curves.values()]
    assert max(first) - min(first) < 5e-3  # the base's loss, whatever the start
    assert (tmp_path / "losses.png").read_bytes()[:4] == b"\x89PNG"

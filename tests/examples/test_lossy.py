"""Statistics in lossy steps on a real model, cut short, as examples/lossy.py does it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_lossy_example_runs_and_outputs_lose_less(tmp_path):
    words = [str(tmp_path / "out"), "--short", "--json", str(tmp_path / "tables.json")]
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "lossy.py"), *words],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\nok: " in done.stdout and "WRONG" not in done.stdout
    tables = json.loads((tmp_path / "tables.json").read_text())
    assert done.stdout.count("|---") >= len(tables)
    for name, row in tables["output_error"].items():
        assert 0 < row["with"] < row["without"] < 1, name
    assert {len(row) for name in ("resize", "combine") for row in tables[name].values()} == {3}

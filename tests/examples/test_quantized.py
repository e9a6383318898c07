"""Quantizing a real model, and what makes up for it, as examples/quantized.py does it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_quantized_example_runs_and_what_must_hold_holds(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "quantized.py"), str(tmp_path / "out"), "--json"],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    # better than plain nf4, packed as decoded, merged as trained; roundings into six formats, of
    # which 4 bits lose the adapter, as bf16 does that of a short fine-tune
    assert done.stderr.count("\nok: ") >= 7 + 5 + 2 + 6 + 3 + 2
    assert "WRONG" not in done.stderr
    actual = json.loads(done.stdout)
    table = {name: row["perplexity"] for name, row in actual["table"].items()}
    with_stats, without = (
        table["nf4 + LoftQ, 4 iterations, --stats"],
        table["nf4 + LoftQ, 4 iterations"],
    )
    assert table["base"] < with_stats < without < table["nf4 + LoftQ, 1 iteration"] < table["nf4"]
    for name in ("nf4", "fp4", "mxfp4", "bf16, short fine-tune"):
        losses = {row: metric["task"] for row, metric in actual["rounding"][name].items()}
        drawn = [loss for row, loss in losses.items() if row.startswith("stochastic")]
        assert max(drawn) < losses["nearest"] < losses["no adapter"], name

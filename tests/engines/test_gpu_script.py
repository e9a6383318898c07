"""The script of a card's hour: it says that there is no card, its steps run, and it counts
right."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).parents[2] / "examples" / "benchmarks"


def call(*arguments: object) -> subprocess.CompletedProcess:
    argv = [sys.executable, str(SCRIPTS / "gpu.py"), *map(str, arguments)]
    return subprocess.run(argv, capture_output=True, text=True)


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card, and the hour would begin")
def test_without_a_card_it_says_so(tmp_path: Path):
    done = call("--work", tmp_path / "work")
    assert done.returncode == 2 and "no CUDA device" in done.stderr
    assert not (tmp_path / "work").exists()


def test_help_and_unknown_steps():
    assert "decompositions" in call("--help").stdout
    done = call("--steps", "facts,fast")
    assert done.returncode == 2 and "no step fast" in done.stderr


@pytest.mark.parametrize(
    "steps",
    [
        "facts,speed,peers",
        pytest.param("right,races,limits", marks=pytest.mark.slow),
        pytest.param("decompositions,runtime", marks=pytest.mark.slow),
    ],
)
def test_steps_run_on_the_cpu(steps: str, tmp_path: Path):
    small = ("--device", "cpu", "--small", "--work", tmp_path / "work")
    done = call(*small, "--steps", steps, "--json", tmp_path / "gpu.json")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert list(report["steps"]) == steps.split(",") and report["device"] == "cpu"
    assert not any("failed" in figures for figures in report["steps"].values())
    assert str(tmp_path) not in json.dumps(report)


def test_overlaps_are_counted(scripts: None):
    overlaps = importlib.import_module("gpu_figures").overlaps

    found = overlaps({"kernel": [(0, 4)], "to_gpu": [(2, 6), (5, 7)], "to_host": [(6, 8)]})
    # busy 0-8; two kinds 2-4 and 6-7; both ways 6-7
    assert found == {"busy": 1.0, "two": 0.375, "both_ways": 0.125}
    gap = overlaps({"kernel": [(0, 1), (3, 4)], "to_gpu": [], "to_host": []})
    assert gap == {"busy": 0.5, "two": 0.0, "both_ways": 0.0}


def test_steps_between_numbers_are_counted(scripts: None):
    steps_apart = importlib.import_module("gpu_checks").steps_apart

    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        one, tiny = torch.ones(1, dtype=dtype), torch.finfo(dtype).smallest_normal
        above = torch.nextafter(one, 2 * one)
        assert steps_apart(one, above).item() == 1
        assert steps_apart(-one, -above).item() == 1
        assert steps_apart(0 * one, -0.0 * one).item() == 0
        assert steps_apart(tiny * one, -tiny * one).item() > 2

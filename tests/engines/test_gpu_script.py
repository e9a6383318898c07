"""The script of a card's hour: it says that there is no card, its steps run, and it counts
right."""

import importlib
import json
import re
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path
from types import SimpleNamespace

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
def test_without_a_gpu_the_script_reports_it(tmp_path: Path):
    done = call("--work", tmp_path / "work")
    assert done.returncode == 2 and "no CUDA device" in done.stderr
    assert not (tmp_path / "work").exists()


def test_help_and_unknown_steps():
    assert "decompositions" in call("--help").stdout
    done = call("--steps", "facts,fast")
    assert done.returncode == 2 and "no step fast" in done.stderr


# ranges of what only a GPU, or more than two cores, have
ON_GPU = ("pinned/", "pageable/", "disk/16", "reserved_of", "peak_of", "fast", "clean", "merges/4 ")


@pytest.mark.parametrize(
    "steps",
    [
        "facts,peers",
        pytest.param("speed", marks=pytest.mark.slow),
        pytest.param("right,races,limits", marks=pytest.mark.slow),
        pytest.param("stats,decompositions,runtime", marks=pytest.mark.slow),
    ],
)
def test_steps_run_on_the_cpu(steps: str, tmp_path: Path, scripts: None):
    small = ("--device", "cpu", "--small", "--work", tmp_path / "work")
    done = call(*small, "--steps", steps, "--json", tmp_path / "gpu.json")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert list(report["steps"]) == steps.split(",") and report["device"] == "cpu"
    assert not any("failed" in figures for figures in report["steps"].values())
    assert str(tmp_path) not in json.dumps(report)
    leaves, expected = (
        importlib.import_module("gpu").leaves,
        importlib.import_module("gpu_expected"),
    )
    for name, figures in report["steps"].items():
        places = [place for place, _ in leaves(figures)]
        for one in expected.EXPECTED[name]:
            if not any(word in one.pattern for word in ON_GPU):
                pattern = re.sub(r"\d+(x\d+)?", "*", one.pattern)  # other sizes
                assert any(fnmatchcase(place, pattern) for place in places), one.pattern


def test_a_step_whose_process_dies_is_named(
    tmp_path: Path, scripts: None, monkeypatch: pytest.MonkeyPatch
):
    gpu, dies = importlib.import_module("gpu"), tmp_path / "dies"
    dies.write_text("#!/bin/sh\nexit 3\n")
    dies.chmod(0o755)
    monkeypatch.setattr(gpu.sys, "executable", str(dies))
    figures = gpu.in_process("facts", gpu.Settings("cpu", tmp_path, 0.02, True))
    assert figures["failed"] == "exit status 3"


def test_a_failed_case_is_listed_with_the_others(
    tmp_path: Path, scripts: None, monkeypatch: pytest.MonkeyPatch
):
    gpu, checks = importlib.import_module("gpu"), importlib.import_module("gpu_checks")

    def unlike(settings: object, name: str) -> dict:
        if name == "merge-plain":
            raise ZeroDivisionError("planted")
        return {"share": 0.0}

    monkeypatch.setattr(checks, "unlike", unlike)
    monkeypatch.setattr(checks, "misrounded", lambda *_: 0.5)
    figures = gpu.run_step("right", gpu.Settings("cpu", tmp_path, 0.02, True))
    assert figures["jobs"]["merge-plain"] == {"failed": "ZeroDivisionError: planted"}
    assert figures["jobs"]["quantize-nf4"] == {"share": 0.0}
    assert "jobs/merge-plain" in figures["failed"]
    assert "misrounded_share/torch.bfloat16" in figures["failed"]


def test_too_little_memory_is_reported(
    tmp_path: Path, scripts: None, monkeypatch: pytest.MonkeyPatch
):
    gpu = importlib.import_module("gpu")
    monkeypatch.setattr(gpu.shutil, "disk_usage", lambda path: SimpleNamespace(free=35 * 10**9))
    problem = gpu.missing(gpu.Settings("cpu", tmp_path / "none" / "yet", 16.0, False))
    assert "35.0 GB are free" in problem and "--size 10" in problem


def test_figures_are_shown_with_the_expected_ones(scripts: None):
    verdicts = importlib.import_module("gpu_expected").verdicts
    fast, slow = verdicts("facts", {"pinned/to_gpu": 52.0, "pinned/both": 40.0, "torch": "2.15"})
    assert fast.is_inside and str(fast) == "pinned/to_gpu: 52 GB/s, expected 45 to 60 GB/s"
    assert str(slow).startswith("! pinned/both: 40 GB/s") and "numactl" in str(slow)
    (wrong,) = verdicts("races", {"merge-head/late_streams": False})
    assert not wrong.is_inside


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

"""The public conformance set: our reader gives what it says, its files are those that the formats'
own tools wrote, and its runner finds what a program gets wrong."""

import json
import struct
import subprocess
import sys
from array import array
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapterkit.adapters.formats.library import formats
from conformance import make, run
from tests.support.adapter_samples import GOLDEN, all_samples
from tests.support.documents import ROOT

HERE = ROOT / "conformance"
CASES = json.loads((HERE / "index.json").read_text("utf-8"))["cases"]
KOHYA = CASES["kohya/sdxl"]["tensors"]


def test_every_format_and_sample_is_a_case_and_all_of_it_is_small():
    assert {case["format"] for case in CASES.values()} == set(formats())
    samples = {one.path.relative_to(GOLDEN).with_suffix("").as_posix() for one in all_samples()}
    assert samples == set(CASES)
    kept = (p for p in HERE.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    assert sum(path.stat().st_size for path in kept) < 1_000_000


@pytest.mark.parametrize("name", CASES)
def test_every_file_of_the_set_is_read_as_described(name: str):
    tensors = CASES[name]["tensors"]
    assert tensors and all(one["sha256"] for one in tensors.values())
    assert make.expected(CASES[name]) == tensors


@pytest.mark.parametrize("name", CASES)
def test_the_files_equal_those_of_the_tools_except_their_values(name: str, tmp_path: Path):
    """Headers and settings byte for byte; the values as make.py makes them."""
    source = HERE / CASES[name]["source"]
    for path in [source] if source.is_file() else source.iterdir():
        golden = GOLDEN / path.relative_to(HERE / "cases")
        make.copy(golden, tmp_path / path.name)
        if path.suffix == ".safetensors":
            size = 8 + struct.unpack("<Q", path.read_bytes()[:8])[0]
            assert path.read_bytes()[:size] == golden.read_bytes()[:size]
        if path.suffix in (".pt", ".lora", ".bin"):  # torch.save names its own file inside
            made, kept = (
                torch.load(one, weights_only=True) for one in (tmp_path / path.name, path)
            )
            torch.testing.assert_close(made, kept, rtol=0, atol=0)
        else:
            assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path


def test_deltas_against_dense_products():
    """kohya's pairs by their keys alone."""
    file = load_file(HERE / CASES["kohya/sdxl"]["source"])
    ups = {key: value for key, value in file.items() if key.endswith("lora_up.weight")}
    digests = set()
    for key, up in ups.items():
        down, alpha = (
            file[key.replace("lora_up.weight", n)] for n in ("lora_down.weight", "alpha")
        )
        scale = float(alpha) / len(down)
        delta = scale * torch.einsum("or,r...->o...", up.flatten(1).double(), down.double())
        digests.add(run.digest(array("d", delta.flatten().tolist()), scale))
    assert digests >= {one["sha256"] for one in KOHYA.values()} and len(digests) > 3


def test_a_wrong_program_fails_the_set(tmp_path: Path):
    """A reader that forgets the scale, one that drops a module, one that turns a matrix."""
    words = [sys.executable, str(HERE / "run.py"), "--only", "kohya/sdxl"]
    words += [sys.executable, str(HERE / "read.py")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0 and "1 of 1 cases as expected" in done.stdout, done.stderr
    case = CASES["mlx/lora"]
    out = tmp_path / "out.safetensors"
    subprocess.run(
        [sys.executable, str(HERE / "read.py"), str(HERE / case["source"]), str(out)], check=True
    )
    right = load_file(out)
    name = min(right)

    def told(tensors: dict[str, torch.Tensor]) -> list[str]:
        save_file(tensors, out)
        return run.differences(case["tensors"], run.read(out))

    assert told(right) == []
    assert told(right | {name: right[name] * 2}) == [f"{name}: other values"]
    assert told(right | {name: right[name] * (1 + 1e-6)}) == []
    turned = right[name].T.contiguous()
    assert told(right | {name: turned})[0].startswith(f"{name}: ")
    assert told({**right, "other": turned}) == ["other: not expected"]
    del right[name]
    assert told(right) == [f"{name}: missing"]
    failing = [sys.executable, str(HERE / "run.py"), "--only", "mlx/lora", "false"]
    done = subprocess.run(failing, capture_output=True, text=True)
    assert done.returncode == 1 and "0 of 1 cases as expected" in done.stdout

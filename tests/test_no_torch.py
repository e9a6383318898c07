"""Plans of plain adapters, what is read of headers and hashes, and refusals load neither torch nor
transformers."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.golden.inputs import create_inputs

pytestmark = pytest.mark.quick

# of each job: the verb, its sources, its options
JOBS = {
    "plans": [
        ("merge", ["base", "style"], {}),
        ("merge", ["base", ["style=0.75", "rslora", "dora"]], {}),
        ("merge", ["base", ["style", "skill=0.5"]], {"method": "ties", "density": 0.5}),
        ("merge", ["base", ["style", "skill"]], {"compat": "peft"}),
        ("combine", [["law", "medicine"]], {"method": "linear"}),
        ("combine", [["law", "medicine"]], {"method": "dare_ties", "density": 0.5}),
        ("subtract", ["law"], {"general": ["english"]}),
        ("arrow", [["law", "medicine"]], {}),
        ("resize", ["law"], {"rank": 2}),
        ("resize", ["dora"], {"rank": 2, "base": "base"}),
        ("rebase", ["pissa-trained"], {"initial": "pissa-initial"}),
        ("convert", ["style"], {"to": "peft"}),
        ("convert", ["style"], {"to": "vllm", "base": "base"}),
        ("convert", ["kohya.safetensors"], {"to": "diffusers"}),
        ("edit", ["style"], {"title": "Style"}),
        ("dequantize", ["base-nf4"], {}),
        ("dequantize", ["base-w8a16"], {}),
        ("dequantize", ["base-mxfp4"], {}),
        ("dequantize", ["base-mlx"], {}),
    ],
    "reading": [
        ("verify", ["merged"], {}),
        ("check", ["style"], {"program": "vllm"}),
        ("check", ["style"], {"program": "vllm", "base": "base"}),
        ("inspect", ["base"], {}),
        ("inspect", ["base"], {"headers": True}),
        ("inspect", ["style"], {"headers": True}),
    ],
    "refusals": [
        ("merge", ["base", "wide"], {}),
        ("merge", ["base", "lost"], {}),
        ("merge", ["base", "damaged"], {}),
        ("merge", ["base", "style"], {"device": "tpu"}),
        ("combine", [["law", "style=nan"]], {"method": "linear"}),
        ("combine", [["law", "damaged"]], {"method": "linear"}),
        ("convert", ["style"], {"to": "kohya-sd"}),
        ("resize", ["law"], {"rank": 0}),
    ],
}
RUN = """
import json, sys
import adapterkit
from adapterkit.core.errors import AdapterkitError

for verb, sources, options in json.loads(sys.argv[1]):
    try:
        getattr(adapterkit, verb)(*sources, **options)
        ending = "done"
    except AdapterkitError:
        ending = "refused"
    loaded = sorted({"torch", "transformers"} & sys.modules.keys())
    print(json.dumps([ending, loaded]))
"""


@pytest.fixture
def folder(cached_folder: Callable[..., Path]) -> Path:
    return cached_folder("no torch", _create)


def _create(root: Path) -> None:
    import adapterkit
    from tests.support import quantized_llama

    create_inputs(root)
    adapterkit.merge(root / "base", root / "style", out=root / "merged")
    for to in ("nf4", "w8a16", "mxfp4"):
        adapterkit.quantize(root / "base", to=to, out=root / f"base-{to}")
    quantized_llama.base(quantized_llama.FORMS["mlx4"], root / "base-mlx")
    for name, old, new in (
        ("wide", b"[4,32]", b"[2,64]"),
        ("lost", b"q_proj.lora_B", b"q_proj.lora_C"),
    ):
        (root / name).mkdir()
        config = (root / "style/adapter_config.json").read_bytes()
        (root / name / "adapter_config.json").write_bytes(config)
        data = (root / "style/adapter_model.safetensors").read_bytes()
        assert old in data
        (root / name / "adapter_model.safetensors").write_bytes(data.replace(old, new))
    (root / "damaged").mkdir()
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        data = (root / "style" / file).read_bytes()
        (root / "damaged" / file).write_bytes(data[:-64] if file.endswith("s") else data)


@pytest.mark.parametrize("family", JOBS)
def test_plans_reading_and_refusals_load_no_torch(family: str, folder: Path, tmp_path: Path):
    """One process for all jobs of a family: the first one that loads torch is named first."""
    plan = {} if family == "reading" else {"dry_run": True, "out": str(tmp_path / "out")}
    jobs = [(verb, sources, plan | options) for verb, sources, options in JOBS[family]]
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(jobs)],
        cwd=folder,
        encoding="utf-8",
        capture_output=True,
    )
    found = list(map(json.loads, done.stdout.splitlines()))
    ending = "refused" if family == "refusals" else "done"
    wrong = [pair for pair in zip(JOBS[family], found, strict=True) if pair[1] != [ending, []]]
    assert not wrong, done.stderr

"""Merges into GGUF files by ranks and plan files, stopped and resumed; what `inspect` tells."""

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import adapterkit
from adapterkit.cli import main
from adapterkit.core.errors import Interrupted, Refused
from tests.quantized.gguf.test_merges import train
from tests.support.gguf_files import gguf, llama, split, write

FIRST = "parts/m-00001-of-00003.gguf"


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in one file and in parts, an adapter, and what it becomes."""
    folder = tmp_path_factory.mktemp("job")
    model, message, tensors = llama(num_hidden_layers=4)
    path = write(folder / "m.gguf", "llama", message, tensors)
    split(path, folder / "parts", [20, 5, len(tensors) - 25])
    train(model, folder / "a", target_modules=["q_proj", "down_proj"])
    adapterkit.merge(path, folder / "a", out=folder / "out.gguf")
    adapterkit.merge(folder / FIRST, folder / "a", out=folder / "out")
    return folder


def weights(path: Path) -> dict[str, bytes]:
    if path.is_file():
        return {"": path.read_bytes()}
    return {one.name: one.read_bytes() for one in path.glob("*.gguf")}


def run(*words: object) -> str:
    result = CliRunner().invoke(main, [str(word) for word in words], catch_exceptions=False)
    assert not result.exit_code, result.output
    return result.output


@pytest.mark.parametrize("base, expected", [("m.gguf", "out.gguf"), (FIRST, "out")])
def test_by_ranks_and_plan_files(base: str, expected: str, job: Path, tmp_path: Path):
    out, plan = tmp_path / expected, tmp_path / "plan.json"
    dry = run("merge", job / base, job / "a", "--out", out, "--dry-run")
    assert "8" in dry and not out.exists()
    run("merge", job / base, job / "a", "--out", out, "--plan", plan)
    for rank in ("1/2", "0/2"):
        run("run", plan, "--worker", rank)
    run("finish", plan, "--verify")
    assert weights(out) == weights(job / expected)
    assert {path.name for path in tmp_path.iterdir()} <= {
        expected,
        "plan.json",
        f"{expected}.adapterkit.json",
    }


@pytest.mark.parametrize("base, expected", [("m.gguf", "out.gguf"), (FIRST, "out")])
def test_a_stopped_run_is_resumed(base: str, expected: str, job: Path, tmp_path: Path):
    for when in (0, 3, 9):
        calls = iter(range(1000))

        def progress(done: int, calls=calls, when=when) -> None:
            if next(calls) == when:
                raise KeyboardInterrupt

        out = tmp_path / str(when) / expected
        out.parent.mkdir()
        with pytest.raises(Interrupted):
            adapterkit.merge(job / base, job / "a", out=out, progress=progress)
        assert not out.exists()
        adapterkit.merge(job / base, job / "a", out=out, resume=True)
        assert weights(out) == weights(job / expected)


def test_inspect_reports_a_gguf_model(job: Path, tmp_path: Path):
    _, message, tensors = llama()
    name = "blk.0.ffn_down.weight"
    shape = tensors[name].shape
    kind = gguf.GGMLQuantizationType.Q8_0
    tensors[name] = (kind, gguf.quantize(tensors[name], kind))
    path = write(tmp_path / "m.gguf", "llama", message, tensors)
    found: Any = adapterkit.inspect(path)
    assert found["kind"] == "base" and not found["problems"] and found["readable"]
    assert found["architecture"]["model_type"] == "llama" and found["tied"]["head_stored"]
    count = shape[0] * shape[1]
    q8_0 = {"tensors": 1, "parameters": count, "bytes": count // 32 * 34}
    assert found["dtypes"]["Q8_0"] == q8_0 and "Q8_0" in found["quantization"]["found"]
    parts: Any = adapterkit.inspect(job / FIRST)
    whole: Any = adapterkit.inspect(job / "m.gguf")
    assert parts["dtypes"] == whole["dtypes"] and len(parts["shards"]) == 3
    path.write_bytes(path.read_bytes()[:3000])
    found = adapterkit.inspect(path)
    assert not found["readable"] and found["problems"]
    with pytest.raises(Refused, match="a model, no adapter"):
        adapterkit.inspect(job / "m.gguf", base=job / "m.gguf")

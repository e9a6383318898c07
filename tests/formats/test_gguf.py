"""GGUF adapters against those that llama.cpp's converter makes of the same PEFT adapters."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

import adapterkit
from adapterkit.core.errors import AdapterkitError, Refused
from tests.support import oracle
from tests.support.mlx_models import loaded, logits, off, seeing, trained

gguf = pytest.importorskip("gguf")

GOLDEN = Path(__file__).parent / "golden" / "gguf"
EXPERTS = ("mixtral", "qwen3_moe")
CASES = sorted(path.parent.name for path in GOLDEN.glob("*/f32.gguf"))


def tensors(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}


def metadata(path: Path) -> dict[str, Any]:
    fields = gguf.GGUFReader(path).fields
    return {key: field.contents() for key, field in fields.items() if not key.startswith("GGUF")}


def peft_tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def save_model(config: Path, folder: Path) -> Path:
    """A model of that config, with weights."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config))
    oracle.save_base(model, folder, "fp32")
    return folder


@pytest.mark.parametrize("case", CASES)
def test_written_files_equal_the_converter_s(case: str, tmp_path: Path):
    home = GOLDEN / case
    adapterkit.convert(home / "adapter", to="gguf", base=home / "base", out=tmp_path / "a.gguf")
    ours, theirs = tensors(tmp_path / "a.gguf"), tensors(home / "f32.gguf")
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype and np.array_equal(ours[name], value), name
    expected = metadata(home / "f32.gguf")
    unread = ("general.name", "general.quantization_version")  # llama.cpp does not ask for them
    assert metadata(tmp_path / "a.gguf") == {k: v for k, v in expected.items() if k not in unread}


@pytest.mark.parametrize("case", CASES)
def test_a_gguf_file_converts_back_to_the_adapter(case: str, tmp_path: Path):
    home, out = GOLDEN / case, tmp_path / "out"
    to = "peft-per-expert" if case in EXPERTS else "peft"
    adapterkit.convert(home / "f32.gguf", to=to, base=home / "base", out=out)
    ours, theirs = peft_tensors(out), peft_tensors(home / "adapter")
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert torch.equal(ours[key], value), key
    read, written = (json.loads((folder / "adapter_config.json").read_text()) for folder in (
        out, home / "adapter"
    ))  # fmt: skip
    for key in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "alora_invocation_tokens"):
        assert read.get(key) == written[key], key


# --- scales ---------------------------------------------------------------------------------------


def write_adapter(folder: Path, tensors: dict[str, Tensor], **settings: Any) -> Path:
    """An adapter in PEFT's layout; keys without their prefix."""
    folder.mkdir(parents=True)
    named = {f"base_model.model.{key}": value for key, value in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors")
    targets = sorted({key.rpartition(".lora_")[0] for key in tensors})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": targets} | settings
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def pair(name: str, rank: int, out: int, width: int, seed: int = 0) -> dict[str, Tensor]:
    """a and b of one module."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{name}.lora_A.weight": torch.randn(rank, width, generator=generator),
        f"{name}.lora_B.weight": torch.randn(out, rank, generator=generator),
    }


def deltas(path: Path) -> dict[str, np.ndarray]:
    """alpha / rank · b @ a of every module, as llama.cpp scales it, in float64."""
    values, alpha = tensors(path), metadata(path)["adapter.lora.alpha"]
    result = {}
    for key in values:
        if key.endswith(".lora_a"):
            name = key.removesuffix(".lora_a")
            a, b = (values[f"{name}.lora_{x}"].astype(np.float64) for x in "ab")
            result[name.removesuffix(".weight")] = (alpha / b.shape[-1] if alpha else 1) * b @ a
    return result


V, OUT = "model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.o_proj"
UP = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize("rslora", [False, True])
def test_other_ranks_and_alphas_keep_their_scale(rslora: bool, tmp_path: Path):
    """llama.cpp has one alpha, and divides it by the rank of each module's tensors."""
    ranks, alphas = {V: 2, OUT: 3, UP: 2}, {V: 4.0, OUT: 4.0, UP: 7.0}
    parts = {
        **pair(V, ranks[V], 16, 32, 1),
        **pair(OUT, ranks[OUT], 32, 32, 2),
        **pair(UP, ranks[UP], 48, 32, 3),
    }
    folder = write_adapter(
        tmp_path / "in", parts, rank_pattern={OUT: 3}, alpha_pattern={UP: 7}, use_rslora=rslora
    )
    adapterkit.convert(folder, to="gguf", base=GOLDEN / "qwen2" / "base", out=tmp_path / "a.gguf")
    names = {V: "blk.0.attn_v", OUT: "blk.1.attn_output", UP: "blk.0.ffn_up"}
    actual = deltas(tmp_path / "a.gguf")
    for module, rank in ranks.items():
        a, b = (parts[f"{module}.lora_{x}.weight"].double().numpy() for x in "AB")
        expected = alphas[module] / (rank**0.5 if rslora else rank) * b @ a
        error = np.abs(actual[names[module]] - expected).max() / np.abs(expected).max()
        assert error < 2e-7, module
    stored = tensors(tmp_path / "a.gguf")["blk.0.attn_v.weight.lora_b"]
    assert rslora or np.array_equal(stored, parts[f"{V}.lora_B.weight"])  # the commonest alpha


@pytest.mark.parametrize("change", [
    lambda data: data.replace(struct.pack("<If", 6, 3), struct.pack("<If", 6, 0)),
    lambda data: data.replace(b"adapter.lora.alpha", b"adapter.lora.alphX"),
])  # fmt: skip
def test_without_an_alpha_the_scale_is_1(change: Callable[[bytes], bytes], tmp_path: Path):
    """As llama.cpp takes it: 0 is none."""
    home, path = GOLDEN / "qwen3_moe", tmp_path / "a.gguf"
    path.write_bytes(change((home / "f32.gguf").read_bytes()))
    adapterkit.convert(path, to="peft-per-expert", base=home / "base", out=tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"] == 2


def test_an_alpha_of_0_stays_0(tmp_path: Path):
    folder = write_adapter(tmp_path / "in", pair(V, 2, 16, 32), lora_alpha=0)
    adapterkit.convert(folder, to="gguf", base=GOLDEN / "qwen2" / "base", out=tmp_path / "a.gguf")
    assert not deltas(tmp_path / "a.gguf")["blk.0.attn_v"].any()


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_16_bit_files_equal_the_converter_s(dtype: str, tmp_path: Path):
    """The converter's files of 16 bits, tensor for tensor."""
    home, theirs = GOLDEN / "llama", {"fp16": "f16.gguf", "bf16": "bf16.gguf"}[dtype]
    out = tmp_path / "a.gguf"
    adapterkit.convert(home / "adapter", to="gguf", base=home / "base", out=out, dtype=dtype)
    ours, golden = tensors(out), tensors(home / theirs)
    for name, value in golden.items():
        assert ours[name].dtype == value.dtype and np.array_equal(ours[name], value), name


def test_blocks_are_read(tmp_path: Path):
    """Q8_0 as the package decodes it."""
    home = GOLDEN / "llama"
    adapterkit.convert(home / "q8_0.gguf", to="peft", base=home / "base", out=tmp_path / "out")
    actual = peft_tensors(tmp_path / "out")
    for tensor in gguf.GGUFReader(home / "q8_0.gguf").tensors:
        if tensor.tensor_type.name == "Q8_0" and "attn_v" in tensor.name:
            layer = tensor.name.split(".")[1]
            key = f"base_model.model.model.layers.{layer}.self_attn.v_proj.lora_A.weight"
            expected = gguf.dequantize(tensor.data, tensor.tensor_type)
            assert np.array_equal(actual[key].float().numpy(), expected)


# --- experts --------------------------------------------------------------------------------------


def test_experts_that_are_missing_are_zeros(tmp_path: Path):
    """And one with another rank and alpha is padded, with the ratio in b; as many experts as the
    base has."""
    stem = "model.layers.1.mlp.experts"
    parts = {**pair(f"{stem}.0.up_proj", 2, 16, 32, 1), **pair(f"{stem}.1.up_proj", 3, 16, 32, 2)}
    folder = write_adapter(
        tmp_path / "in",
        parts,
        rank_pattern={f"{stem}.1.up_proj": 3},
        alpha_pattern={f"{stem}.1.up_proj": 5},
    )
    out = tmp_path / "a.gguf"
    adapterkit.convert(folder, to="gguf", base=GOLDEN / "qwen3_moe" / "base", out=out)
    actual = deltas(out)["blk.1.ffn_up_exps"]
    assert actual.shape == (3, 16, 32) and not actual[2].any()
    for expert, (rank, alpha) in enumerate([(2, 4), (3, 5)]):
        name = f"{stem}.{expert}.up_proj"
        a, b = (parts[f"{name}.lora_{x}.weight"].double().numpy() for x in "AB")
        assert np.allclose(actual[expert], alpha / rank * b @ a, rtol=1e-5, atol=1e-6)


def test_stacks_of_experts_need_the_base_and_keep_their_delta(tmp_path: Path):
    """PEFT's factors of gate_up_proj become gate and up, with one a."""
    home = GOLDEN / "qwen3_moe" / "base"
    base = save_model(home, tmp_path / "base")
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    stem, experts, rank = "model.layers.0.mlp.experts", 3, 2
    parts = {
        f"{stem}.base_layer.lora_A.weight": draw(experts * rank, 32),
        f"{stem}.base_layer.lora_B.weight": draw(32, rank * experts),
        f"{stem}.lora_A.weight": draw(experts * rank, 16),
        f"{stem}.lora_B.weight": draw(32, rank * experts),
    }
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    folder = write_adapter(
        tmp_path / "in", parts, target_modules=[], target_parameters=targets, peft_version="0.21.2"
    )
    with pytest.raises(Refused, match="--base"):
        adapterkit.convert(folder, to="gguf", base=home, out=tmp_path / "no.gguf")
    adapterkit.convert(folder, to="gguf", base=base, out=tmp_path / "a.gguf")
    actual = deltas(tmp_path / "a.gguf")
    gate_up = np.concatenate([actual[f"blk.0.ffn_{x}_exps"] for x in ("gate", "up")], axis=1)
    for key, value in (("base_layer.", gate_up), ("", actual["blk.0.ffn_down_exps"])):
        a = parts[f"{stem}.{key}lora_A.weight"].double().view(experts, rank, -1)
        b = parts[f"{stem}.{key}lora_B.weight"].double().view(-1, rank, experts)
        expected = 4 / rank * torch.einsum("ore,eri->eoi", b, a).numpy()
        assert np.allclose(value, expected, rtol=1e-6)
    adapterkit.convert(tmp_path / "a.gguf", to="peft", base=base, out=tmp_path / "back")
    back = peft_tensors(tmp_path / "back")
    for key, value in parts.items():
        assert torch.allclose(back[f"base_model.model.{key}"], value), key


def test_a_router_among_target_parameters_is_a_module(tmp_path: Path):
    """As the same factors of a module of that name."""
    base = save_model(GOLDEN / "qwen3_moe" / "base", tmp_path / "base")
    stem, parts = "model.layers.0.mlp.gate", {}
    for x, shape in (("A", (2, 32)), ("B", (3, 2))):
        parts[f"{stem}.lora_{x}.weight"] = torch.randn(shape)
    files = {}
    for name, how in {
        "module": {"target_modules": ["gate"]},
        "parameter": {"target_modules": [], "target_parameters": ["mlp.gate.weight"]},
    }.items():
        folder, out = write_adapter(tmp_path / name, parts, **how), tmp_path / f"{name}.gguf"
        if name == "parameter":
            with pytest.raises(Refused, match="give the base"):
                adapterkit.convert(folder, to="gguf", out=out)
        adapterkit.convert(folder, to="gguf", base=base, out=out)
        files[name] = tensors(out)
    assert [*files["parameter"]] == [f"blk.0.ffn_gate_inp.weight.lora_{x}" for x in "ab"]
    for key, value in files["module"].items():
        assert np.array_equal(files["parameter"][key], value), key


# --- what is around -------------------------------------------------------------------------------


def test_a_merge_takes_the_file(tmp_path: Path):
    """With the base's heads; the same weights as of the adapter that it was made from."""
    home = GOLDEN / "llama"
    base = save_model(home / "base", tmp_path / "base")
    merged = []
    for number, adapter in enumerate((home / "f32.gguf", home / "adapter")):
        adapterkit.merge(base, [adapter], out=tmp_path / str(number))
        merged.append(load_file(tmp_path / str(number) / "model.safetensors"))
    assert merged[0].keys() == merged[1].keys()
    for key, value in merged[0].items():
        assert torch.equal(value, merged[1][key]), key


def test_copies_of_the_base_are_left_out(tmp_path: Path):
    """PEFT saves the weights of embeddings beside their factors."""
    home = GOLDEN / "llama_embeddings"
    folder = tmp_path / "in"
    shutil.copytree(home / "adapter", folder)
    copies = {
        f"base_model.model.{name}.base_layer.weight": torch.ones(40, 32)
        for name in ("model.embed_tokens", "lm_head")
    }
    save_file(peft_tensors(folder) | copies, folder / "adapter_model.safetensors")
    out = tmp_path / "a.gguf"
    receipt: Any = adapterkit.convert(folder, to="gguf", base=home / "base", out=out)
    assert any("left out, because the base has them" in note for note in receipt.data["notes"])
    assert tensors(out).keys() == tensors(home / "f32.gguf").keys()


def test_language_models_of_models_that_see(tmp_path: Path):
    """Under the names that they have there, with the heads of their text_config."""
    text = json.loads((GOLDEN / "qwen2" / "base" / "config.json").read_text())
    base = base_with(tmp_path / "base", model_type="qwen2_5_vl", text_config=text)
    module = "model.language_model.layers.0.self_attn.v_proj"
    folder = write_adapter(tmp_path / "in", pair(module, 2, 16, 32))
    adapterkit.convert(folder, to="gguf", base=base, out=tmp_path / "a.gguf")
    assert metadata(tmp_path / "a.gguf")["general.architecture"] == "qwen2vl"
    assert [*deltas(tmp_path / "a.gguf")] == ["blk.0.attn_v"]
    adapterkit.convert(tmp_path / "a.gguf", to="peft", out=tmp_path / "back")
    assert peft_tensors(tmp_path / "back").keys() == peft_tensors(folder).keys()


@pytest.mark.parametrize("kind, architecture", [
    ("gemma3", "gemma3"), ("gemma4", "gemma4"), ("mistral3", "mistral3"), ("qwen3_vl", "qwen3vl"),
    ("qwen3_5", "qwen35"),
])  # fmt: skip
def test_language_models_inside_others_there_and_back(kind: str, architecture: str, tmp_path: Path):
    """Towers have layers of the same names in some."""
    base = seeing(kind, tmp_path / "base")
    auto = AutoModelForImageTextToText
    targets = r".*language_model\..*((q|k|down|out)_proj|in_proj_\w+)"
    model = trained(base, tmp_path / "peft", auto=auto, r=2, target_modules=targets)
    adapterkit.convert(tmp_path / "peft", to="gguf", base=base, out=tmp_path / "a.gguf")
    assert metadata(tmp_path / "a.gguf")["general.architecture"] == architecture
    assert all(name.startswith("blk.") for name in tensors(tmp_path / "a.gguf"))
    adapterkit.convert(tmp_path / "a.gguf", to="peft", base=base, out=tmp_path / "back")
    before, back = peft_tensors(tmp_path / "peft"), peft_tensors(tmp_path / "back")
    assert before.keys() == back.keys()
    assert all(torch.equal(value, back[key]) for key, value in before.items())
    adapterkit.merge(base, tmp_path / "a.gguf", out=tmp_path / "merged")
    assert off(logits(loaded(tmp_path / "merged", auto)), logits(model)) < 1e-5


def test_inspect_reports_a_gguf_adapter(tmp_path: Path):
    home = GOLDEN / "llama"
    with pytest.raises(Refused, match="number of heads"):
        adapterkit.inspect(home / "f32.gguf")
    base = save_model(home / "base", tmp_path / "base")
    report = adapterkit.inspect(home / "f32.gguf", base=base)
    assert report["format"].startswith("gguf") and len(report["modules"]) == 14
    assert not report["problems"]


def test_the_base_is_named_by_its_id(tmp_path: Path):
    folder = write_adapter(
        tmp_path / "in", pair(V, 2, 16, 32), base_model_name_or_path="org/Some-Model"
    )
    base, out = GOLDEN / "qwen2" / "base", tmp_path / "a.gguf"
    receipt: Any = adapterkit.convert(folder, to="gguf", base=base, out=out)
    told = metadata(out)
    assert told["general.base_model.count"] == 1
    assert told["general.base_model.0.name"] == "Some-Model"
    assert told["general.base_model.0.repo_url"] == "https://huggingface.co/org/Some-Model"
    assert any("--lora a.gguf" in note for note in receipt.data["notes"])
    adapterkit.convert(out, to="peft", out=tmp_path / "back")
    config = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/Some-Model"


def test_a_path_is_no_id(tmp_path: Path):
    folder = write_adapter(
        tmp_path / "in", pair(V, 2, 16, 32), base_model_name_or_path="/home/someone/model"
    )
    adapterkit.convert(folder, to="gguf", base=GOLDEN / "qwen2" / "base", out=tmp_path / "a.gguf")
    assert b"someone" not in (tmp_path / "a.gguf").read_bytes()


def test_equal_input_gives_equal_bytes_and_a_folder_is_verified(tmp_path: Path):
    home = GOLDEN / "mixtral"
    for name in ("one", "two"):
        adapterkit.convert(home / "adapter", to="gguf", base=home / "base", out=tmp_path / name)
    first, second = (tmp_path / name / "adapter.gguf" for name in ("one", "two"))
    assert first.read_bytes() == second.read_bytes()
    assert adapterkit.verify(tmp_path / "one")["files"]
    data = bytearray(first.read_bytes())
    data[-5] ^= 1
    first.write_bytes(data)
    with pytest.raises(AdapterkitError, match=r"blk\.\d"):
        adapterkit.verify(tmp_path / "one")


# --- refusals -------------------------------------------------------------------------------------


def base_with(folder: Path, **settings: Any) -> Path:
    """A base of another config, without weights."""
    folder.mkdir()
    config = json.loads((GOLDEN / "qwen2" / "base" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))
    return folder


EMBED = {
    "model.embed_tokens.lora_embedding_A": torch.ones(2, 40),
    "model.embed_tokens.lora_embedding_B": torch.ones(32, 2),
}
MAGNITUDE = {f"{V}.lora_magnitude_vector": torch.ones(16)}


@pytest.mark.parametrize("settings, parts, more, text", [
    (None, pair(V, 2, 16, 32), {}, "--base MODEL"),
    ({"model_type": "zamba"}, pair(V, 2, 16, 32), {}, "'zamba'"),
    ({"tie_word_embeddings": True}, EMBED, {}, "one weight for embeddings and head"),
    ({"tie_word_embeddings": True}, pair("lm_head", 2, 40, 32), {}, "one weight for"),
    ({}, pair("model.layers.0.self_attn.rotary", 2, 16, 32), {}, "self_attn.rotary"),
    ({}, {**pair(V, 2, 16, 32), **MAGNITUDE}, {"use_dora": True}, "magnitude"),
    ({"model_type": "llama", "num_attention_heads": None},
     pair("model.layers.0.self_attn.q_proj", 2, 32, 32), {}, "number of heads"),
    ({"model_type": "llama", "num_attention_heads": 5, "num_key_value_heads": 5},
     pair("model.layers.0.self_attn.q_proj", 2, 32, 32), {}, "multiple of"),
])  # fmt: skip
def test_adapters_that_gguf_cannot_store_are_refused(
    settings: dict | None, parts: dict, more: dict, text: str, tmp_path: Path
):
    base = None if settings is None else base_with(tmp_path / "base", **settings)
    folder = write_adapter(tmp_path / "in", parts, **more)
    with pytest.raises(Refused, match=text):
        adapterkit.convert(folder, to="gguf", base=base, out=tmp_path / "a.gguf")
    assert not list(tmp_path.glob("*.gguf*"))


@pytest.mark.parametrize("change, text", [
    (lambda d: d.replace(b"\0llama", b"\0ll4ma", 1), "ll4ma"),
    (lambda d: d.replace(b"blk.0.ffn_up.weight.lora_b", b"blk.0.ffn_up.weight.lora_X"), "ffn_up"),
    (lambda d: d.replace(b"blk.0.attn_v.weight.lora_a", b"blk.0.attn_w.weight.lora_a")
     .replace(b"blk.0.attn_v.weight.lora_b", b"blk.0.attn_w.weight.lora_b"), "attn_w"),
    (lambda d: d.replace(b"blk.1.ffn_up", b"blk.0.ffn_up"), "twice"),
])  # fmt: skip
def test_damaged_gguf_adapters_are_refused(
    change: Callable[[bytes], bytes], text: str, tmp_path: Path
):
    home, path = GOLDEN / "llama", tmp_path / "a.gguf"
    path.write_bytes(change((home / "f32.gguf").read_bytes()))
    with pytest.raises(AdapterkitError, match=text):
        adapterkit.convert(path, to="peft", base=home / "base", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_rows_of_heads_need_the_base(tmp_path: Path):
    with pytest.raises(Refused, match="--base"):
        adapterkit.convert(GOLDEN / "llama" / "f32.gguf", to="peft", out=tmp_path / "out")


def test_an_activated_lora_goes_nowhere_else(tmp_path: Path):
    home = GOLDEN / "qwen2"
    with pytest.raises(Refused, match="activated"):
        adapterkit.convert(home / "f32.gguf", to="mlx", out=tmp_path / "out")
    base = save_model(home / "base", tmp_path / "base")
    with pytest.raises(Refused, match="alora_invocation_tokens"):
        adapterkit.merge(base, [home / "f32.gguf"], out=tmp_path / "merged")

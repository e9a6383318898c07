"""Adapters merged into GGUF files: what llama.cpp's readers find is what PEFT's forward gives."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import adapterkit
from adapterkit.errors import Refused
from adapterkit.gguf.header import GgufHeader, read_gguf
from adapterkit.planning.inputs.sources import open_source
from tests.support import oracle
from tests.support.gguf_files import MODELS, gguf, llama, write

IDS = torch.arange(12)[None]
TARGETS = {
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "lfm2": ["q_proj", "k_proj", "in_proj", "w1", "w2"],
    "qwen3moe": ["q_proj", "k_proj", "v_proj", "o_proj"],
}
USUAL = ["q_proj", "k_proj", "v_proj", "gate_proj", "down_proj"]


def train(model: nn.Module, out: Path, **config: Any) -> Tensor:
    """An adapter of random factors; the logits of the model with it."""
    torch.manual_seed(3)
    config = {"r": 4, "target_modules": USUAL, "init_lora_weights": False} | config
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fan_in_fan_out, of tied layers, of biases
        wrapped = get_peft_model(model.float(), LoraConfig(**config)).eval()
        wrapped.save_pretrained(out)
    with torch.no_grad():
        return wrapped(IDS).logits


def header(path: Path) -> GgufHeader:
    return read_gguf(open_source(path), path.name)


def logits(path: Path) -> Tensor:
    """Of the model in a file as transformers reads it."""
    with oracle.quiet():
        model = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32
        )
    with torch.no_grad():
        return model.eval()(IDS).logits


def stored(path: Path) -> dict[str, bytes]:
    data = path.read_bytes()
    return {entry.name: data[entry.start : entry.stop] for entry in header(path).tensors}


@pytest.mark.parametrize("arch", MODELS)
def test_the_file_computes_what_peft_computes(arch: str, tmp_path: Path):
    model, message, tensors = MODELS[arch]()
    path = write(tmp_path / "m.gguf", arch, message, tensors)
    expected = train(model, tmp_path / "a", target_modules=TARGETS.get(arch, USUAL))
    out = tmp_path / "merged.gguf"
    receipt: Any = adapterkit.merge(path, tmp_path / "a", out=out, verify=True)
    assert torch.allclose(logits(out), expected, atol=2e-6)
    assert not torch.allclose(logits(path), expected, atol=1e-3)
    # the header and what no adapter touches keep their bytes
    assert out.stat().st_size == path.stat().st_size and header(out).raw == header(path).raw
    before, after = stored(path), stored(out)
    changed = {name for name in before if before[name] != after[name]}
    assert changed and len(changed) == len(receipt.data["parameters"])
    # and back again
    adapterkit.merge(out, f"{tmp_path / 'a'}=-1", out=tmp_path / "back.gguf")
    assert torch.allclose(logits(tmp_path / "back.gguf"), logits(path), atol=1e-5)


@pytest.mark.parametrize(
    "arch, config",
    [
        ("llama", {"use_dora": True, "target_modules": ["q_proj", "k_proj"]}),
        ("gpt2", {"lora_bias": True, "target_modules": ["c_attn", "c_fc"]}),
        ("llama", {"use_rslora": True, "target_modules": "all-linear"}),
    ],
)
def test_other_kinds_of_adapters(arch: str, config: dict, tmp_path: Path):
    model, message, tensors = MODELS[arch]()
    path = write(tmp_path / "m.gguf", arch, message, tensors)
    expected = train(model, tmp_path / "a", **config)
    adapterkit.merge(path, tmp_path / "a", out=tmp_path / "merged.gguf")
    assert torch.allclose(logits(tmp_path / "merged.gguf"), expected, atol=2e-6)


def test_values_that_were_trained_whole(tmp_path: Path):
    model, message, tensors = MODELS["gemma3"]()
    path = write(tmp_path / "m.gguf", "gemma3", message, tensors)
    whole = ["input_layernorm", "q_norm", "up_proj"]
    wrapped = get_peft_model(
        model.float(), LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=whole)
    )
    oracle.perturb(wrapped, 5)
    wrapped.eval().save_pretrained(tmp_path / "a")
    with torch.no_grad():
        expected = wrapped(IDS).logits
    adapterkit.merge(path, tmp_path / "a", out=tmp_path / "merged.gguf", verify=True)
    assert torch.allclose(logits(tmp_path / "merged.gguf"), expected, atol=2e-5)


@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
def test_a_head_that_was_tied_becomes_a_tensor_of_its_own(module: str, tmp_path: Path):
    model, message, tensors = llama(tie_word_embeddings=True)
    path = write(tmp_path / "m.gguf", "llama", message, tensors)
    expected = train(model, tmp_path / "a", target_modules=[module])
    out = tmp_path / "merged.gguf"
    adapterkit.merge(path, tmp_path / "a", out=out, verify=True)
    # PEFT's forward leaves the other side of the tie as it was
    assert torch.allclose(logits(out), expected, atol=2e-6)
    assert {entry.name for entry in header(out).tensors} - {
        entry.name for entry in header(path).tensors
    } == {"output.weight"}
    reader = gguf.GGUFReader(out)
    for name, value in tensors.items():
        [found] = (tensor for tensor in reader.tensors if tensor.name == name)
        same = np.array_equal(found.data, value)
        assert same or (name == "token_embd.weight" and module == "embed_tokens")


def split(path: Path, folder: Path, parts: list[int]) -> list[Path]:
    """The file in parts of so many tensors, as llama-gguf-split writes them."""
    folder.mkdir()
    reader, first, paths = gguf.GGUFReader(path), 0, []
    for number, count in enumerate(parts):
        name = folder / f"m-{number + 1:05d}-of-{len(parts):05d}.gguf"
        writer = gguf.GGUFWriter(name, reader.fields["general.architecture"].contents())
        if number:
            writer.kv_data[0].clear()
        else:
            copy_metadata(reader, writer)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", len(parts))
        writer.add_int32("split.tensors.count", len(reader.tensors))
        for tensor in reader.tensors[first : first + count]:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        first += count
        for step in ("header", "kv_data", "tensors"):
            getattr(writer, f"write_{step}_to_file")()
        writer.close()
        paths.append(name)
    return paths


def copy_metadata(reader: Any, writer: Any) -> None:
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        kind, inner = field.types[0], field.types[1] if len(field.types) > 1 else None
        writer.add_key_value(field.name, field.contents(), kind, sub_type=inner)


def test_a_split_model(tmp_path: Path):
    model, message, tensors = MODELS["qwen3moe"]()
    path = write(tmp_path / "m.gguf", "qwen3moe", message, tensors)
    names = [tensor.name for tensor in gguf.GGUFReader(path).tensors]
    # gate and up of the first layer, one parameter of transformers, are in two files
    cut = names.index("blk.0.ffn_up_exps.weight")
    assert names.index("blk.0.ffn_gate_exps.weight") < cut
    paths = split(path, tmp_path / "parts", [cut, 0, len(names) - cut])
    expected = train(
        model,
        tmp_path / "a",
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj"],
    )
    adapterkit.merge(path, tmp_path / "a", out=tmp_path / "merged.gguf")
    assert torch.allclose(logits(tmp_path / "merged.gguf"), expected, atol=2e-6)
    adapterkit.merge(paths[0], tmp_path / "a", out=tmp_path / "merged", verify=True)
    together = {}
    for one in sorted((tmp_path / "merged").glob("*.gguf")):
        together |= stored(one)
        assert one.stat().st_size == (tmp_path / "parts" / one.name).stat().st_size
    assert together == stored(tmp_path / "merged.gguf")
    (tmp_path / "parts" / paths[1].name).unlink()
    with pytest.raises(Refused, match="1 of 3 parts are missing"):
        adapterkit.merge(paths[0], tmp_path / "a", out=tmp_path / "other")


def test_names_of_outputs_and_options(tiny: Path, tmp_path: Path):
    train(llama()[0], tmp_path / "a")
    with pytest.raises(Refused, match=r"a name that ends in \.gguf"):
        adapterkit.merge(tiny, tmp_path / "a", out=tmp_path / "folder")
    with pytest.raises(Refused, match="--dtype with this base"):
        adapterkit.merge(tiny, tmp_path / "a", out=tmp_path / "m.gguf", dtype="bf16")
    base = tmp_path / "base"
    oracle.save_base(llama()[0], base)
    with pytest.raises(Refused, match=r"m\.gguf for a base that is no single file"):
        adapterkit.merge(base, tmp_path / "a", out=tmp_path / "m.gguf")
    with pytest.raises(Refused, match="--scales with this base"):
        adapterkit.merge(base, tmp_path / "a", out=tmp_path / "m", scales="keep")
    assert not [path for path in tmp_path.iterdir() if path.name[0] == "m"]


def test_a_merge_is_known_again(tiny: Path, tmp_path: Path):
    train(llama()[0], tmp_path / "a")
    adapterkit.merge(tiny, tmp_path / "a", out=tmp_path / "once.gguf")
    receipt: Any = adapterkit.merge(
        tmp_path / "once.gguf", tmp_path / "a", out=tmp_path / "twice.gguf"
    )
    assert any("already" in note for note in receipt.data["notes"])
    result: Any = adapterkit.verify(tmp_path / "once.gguf", base=tiny, adapters=[tmp_path / "a"])
    assert result["tensors"] == 10 and result["rows"]
    data = bytearray((tmp_path / "once.gguf").read_bytes())
    data[-100] ^= 64
    (tmp_path / "once.gguf").write_bytes(data)
    with pytest.raises(adapterkit.errors.Damaged):
        adapterkit.verify(tmp_path / "once.gguf")


def test_difference_and_extraction(tiny: Path, tmp_path: Path):
    model = llama()[0]
    expected = train(model, tmp_path / "a", target_modules=["q_proj", "k_proj"])
    adapterkit.merge(tiny, tmp_path / "a", out=tmp_path / "m.gguf")
    found: Any = adapterkit.diff(tiny, tmp_path / "m.gguf")
    rows = {row["name"]: row["a"]["dtype"] for row in found["changed"]}
    assert len(rows) == 4 and all("q_proj" in name or "k_proj" in name for name in rows)
    assert set(rows.values()) == {"F32"}
    adapterkit.extract(tiny, tmp_path / "m.gguf", rank=4, out=tmp_path / "again")
    adapterkit.merge(tiny, tmp_path / "again", out=tmp_path / "m2.gguf")
    assert torch.allclose(logits(tmp_path / "m2.gguf"), expected, atol=1e-5)

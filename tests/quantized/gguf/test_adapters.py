"""Adapters of every format, several of them, and token rows into GGUF files."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

import adapterkit
from adapterkit.core.errors import Refused
from tests.quantized.gguf import test_families as families
from tests.quantized.gguf.test_merges import IDS, USUAL, logits, stored, train
from tests.support import oracle
from tests.support.gguf_files import MODELS, llama, write
from tests.support.usual import usual


def file_of(arch: str, folder: Path, **how: Any) -> tuple[Any, Path]:
    """A model and its file."""
    if arch in families.FAMILIES:
        model = families.model_of(arch)
        tensors, message = families.tensors_of(arch, model), families.metadata_of(model)
    else:
        model, message, tensors = MODELS[arch](**how)
    return model, write(folder / "m.gguf", arch, message, tensors)


PAIRS = [
    (form, arch) for form in ("mlx", "gguf", "sglang") for arch in ("llama", "gemma3", "granite")
]
PAIRS += [("tinker", "llama")]


@pytest.mark.parametrize("form, arch", usual(PAIRS, PAIRS[0:6:5]))
def test_other_formats_are_merged_as_what_they_are_converted_to(
    form: str, arch: str, tmp_path: Path
):
    model, path = file_of(arch, tmp_path)
    oracle.save_base(model, tmp_path / "base", "fp32")
    train(model, tmp_path / "a", target_modules=USUAL)
    name = "a.gguf" if form == "gguf" else "there"
    adapterkit.convert(tmp_path / "a", to=form, base=tmp_path / "base", out=tmp_path / name)
    adapterkit.convert(tmp_path / name, to="peft", base=path, out=tmp_path / "back")
    results = []
    for number, adapter in enumerate((tmp_path / name, tmp_path / "back", tmp_path / "a")):
        out = tmp_path / f"{number}.gguf"
        adapterkit.merge(path, adapter, out=out)
        results.append(families.read(out))
    before, (converted, back, plain) = stored(path), results
    for name, value in plain.items():
        assert (converted[name] == back[name]).all()
        assert abs(converted[name] - value).max() < 1e-6, name
    assert before != stored(tmp_path / "0.gguf")


@pytest.mark.parametrize("arch", ["qwen3moe", "glm4moe"])
def test_factors_of_each_expert(arch: str, tmp_path: Path):
    model, path = file_of(arch, tmp_path)
    oracle.save_base(model, tmp_path / "base", "fp32")
    stacks = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    train(model, tmp_path / "a", target_modules=["q_proj"], target_parameters=stacks)
    adapterkit.convert(
        tmp_path / "a", to="peft-per-expert", base=tmp_path / "base", out=tmp_path / "each"
    )
    keys = load_file(tmp_path / "each" / "adapter_model.safetensors")
    assert any("experts.2.up_proj" in key for key in keys)
    adapterkit.merge(path, tmp_path / "a", out=tmp_path / "stacks.gguf")
    adapterkit.merge(path, tmp_path / "each", out=tmp_path / "each.gguf", verify=True)
    each = families.read(tmp_path / "each.gguf")
    for name, value in families.read(tmp_path / "stacks.gguf").items():
        assert abs(each[name] - value).max() < 1e-6, name


@pytest.mark.parametrize("tied", [False, True])
def test_trained_token_rows_are_merged_into_gguf(tied: bool, tmp_path: Path):
    model, path = file_of("llama", tmp_path, tie_word_embeddings=tied)
    config = LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[3, 7])
    with oracle.quiet():
        wrapped = get_peft_model(model.float(), config).eval()
        oracle.perturb(wrapped, 2)
        wrapped.save_pretrained(tmp_path / "a")
    with torch.no_grad():
        expected = wrapped(IDS).logits
    adapterkit.merge(path, tmp_path / "a", out=tmp_path / "out.gguf", verify=True)
    assert torch.allclose(logits(tmp_path / "out.gguf"), expected, atol=1e-5)
    before, after = families.read(path), families.read(tmp_path / "out.gguf")
    changed = (before["token_embd.weight"] != after["token_embd.weight"]).any(axis=1)
    assert changed.nonzero()[0].tolist() == [3, 7]
    assert before.keys() == after.keys()


def test_several_with_weights(tmp_path: Path):
    model, path = file_of("granite", tmp_path)
    before = families.tensors_of("granite", model)
    terms = {}
    for name, weight, modules in (("a", 0.5, ["q_proj", "up_proj"]), ("b", -2.0, ["q_proj"])):
        wrapped = families.train(families.model_of("granite"), tmp_path / name, modules, [])
        with oracle.quiet():
            merged = families.tensors_of("granite", wrapped.merge_and_unload())
        terms[name] = (weight, merged)
    weights = {str(tmp_path / name): weight for name, (weight, _) in terms.items()}
    adapterkit.merge(path, weights, out=tmp_path / "out.gguf", verify=True)
    for name, value in families.read(tmp_path / "out.gguf").items():
        delta = sum(weight * (merged[name] - before[name]) for weight, merged in terms.values())
        assert abs(value.reshape(delta.shape) - before[name] - delta).max() < 2e-6, name


def test_an_adapter_of_another_model_is_refused(tmp_path: Path):
    _, path = file_of("llama", tmp_path)
    train(llama(hidden_size=96)[0], tmp_path / "a")
    with pytest.raises(Refused, match="shape"):
        adapterkit.merge(path, tmp_path / "a", out=tmp_path / "out.gguf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "m.gguf"]

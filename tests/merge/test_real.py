"""Real models: SmolLM2-135M (Llama, tied, bfloat16) and all-MiniLM-L6-v2 (BERT, float32), from
wheels on the package index."""

import json

import peft
import pytest
import torch
import transformers

import adapterkit
import realmodel
from tests.support import oracle
from tests.support.oracle import (
    assert_all_rounded,
    assert_rounded,
    assert_same,
    exact,
    load_checked,
    peft_merged,
    peft_model,
    stored,
)

CAUSAL = transformers.LlamaForCausalLM


@pytest.fixture(scope="session")
def smollm2():
    return realmodel.smollm2(layers=3, shards=2)


@pytest.fixture(scope="session")
def smollm2_lora(smollm2, cached_folder):
    config = {"target_modules": oracle.LINEAR, "r": 8, "lora_alpha": 16, "size": 0.01}
    return cached_folder(
        "smollm2-lora", lambda folder: oracle.train(load_checked(CAUSAL, smollm2), folder, **config)
    )


def test_merged_smollm2_is_the_rounded_float64_value(smollm2, smollm2_lora, tmp_path):
    """Every weight is the rounded float64 value; shards, keys and tie are the base's; the
    verification agrees."""
    oracle.merge(smollm2, smollm2_lora, out=tmp_path / "out", verify=True)
    model = load_checked(CAUSAL, smollm2)
    expected = exact(peft_model(model, smollm2_lora))
    assert len(expected) == 21
    assert_all_rounded(
        load_checked(CAUSAL, tmp_path / "out").state_dict(),
        expected,
        load_checked(CAUSAL, smollm2).state_dict(),
    )
    assert [
        sorted(f.name for f in d.glob("*.safetensors*")) for d in (smollm2, tmp_path / "out")
    ] == [sorted(f.name for f in smollm2.glob("*.safetensors*"))] * 2
    assert (
        adapterkit.verify(tmp_path / "out", base=smollm2, adapters=[smollm2_lora])["tensors"] == 21
    )


def test_smollm2_as_peft(smollm2, smollm2_lora, tmp_path):
    oracle.merge(smollm2, smollm2_lora, out=tmp_path / "out", compat="peft")
    assert_same(
        load_checked(CAUSAL, tmp_path / "out").state_dict(),
        peft_merged(load_checked(CAUSAL, smollm2), smollm2_lora),
    )


def test_smollm2_speaks_as_with_its_adapter(smollm2, smollm2_lora, tmp_path):
    """In float32: the merged model's logits are those of the adapter's model, with the adapter's
    own tokenizer's ids."""
    oracle.merge(smollm2, smollm2_lora, out=tmp_path / "out", dtype="fp32")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    tokens = tokenizer("The capital of France is Paris.", return_tensors="pt").input_ids
    with torch.inference_mode():
        right = peft_model(load_checked(CAUSAL, smollm2).float(), smollm2_lora)(tokens).logits
        plain = load_checked(CAUSAL, smollm2).float()(tokens).logits
        actual = load_checked(CAUSAL, tmp_path / "out")(tokens).logits
    torch.testing.assert_close(actual, right, rtol=1e-3, atol=1e-3)
    assert (right - plain).abs().max() > 0.1


def test_smollm2_head_is_untied(smollm2, tmp_path):
    """A large tied embedding (49,152 rows): many chunks, a new tensor in the last shard."""
    oracle.train(
        load_checked(CAUSAL, smollm2),
        tmp_path / "adapter",
        target_modules=["lm_head"],
        r=2,
        size=0.02,
    )
    oracle.merge(smollm2, tmp_path / "adapter", out=tmp_path / "out")
    before, after = stored(smollm2), stored(tmp_path / "out")
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    expected = exact(peft_model(load_checked(CAUSAL, smollm2), tmp_path / "adapter"))
    assert_rounded(after["lm_head.weight"], expected["lm_head.weight"])
    load_checked(CAUSAL, tmp_path / "out")


def test_merged_minilm_keeps_its_pooling(tmp_path):
    """A sentence encoder whose folder holds more than the model: its pooling and modules go
    along."""
    base = realmodel.minilm()
    with oracle.quiet():
        model = transformers.AutoModel.from_pretrained(base, dtype="auto")
    config = {
        "target_modules": ["query", "value", "dense"],
        "r": 8,
        "size": 0.01,
        "task_type": "FEATURE_EXTRACTION",
    }
    oracle.train(model, tmp_path / "adapter", **config)
    with oracle.quiet():
        again = transformers.AutoModel.from_pretrained(base, dtype="auto")
        wrapped = peft.PeftModel.from_pretrained(again, tmp_path / "adapter")
    oracle.merge(base, tmp_path / "adapter", out=tmp_path / "out", verify=True)
    before, after = stored(base), stored(tmp_path / "out")
    expected = exact(wrapped)
    assert len(expected) == 31 and list(before) == list(after)
    assert_all_rounded(after, expected, before)
    for name in ("modules.json", "1_Pooling/config.json", "tokenizer.json", "vocab.txt"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()


def test_adding_and_subtracting_gives_smollm2_back_within_a_rounding(
    smollm2, smollm2_lora, tmp_path
):
    oracle.merge(smollm2, smollm2_lora, out=tmp_path / "there", dtype="fp32")
    oracle.merge(tmp_path / "there", f"{smollm2_lora}=-1", out=tmp_path / "back", dtype="bf16")
    before, after = stored(smollm2), stored(tmp_path / "back")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        unit = torch.finfo(torch.bfloat16).eps * tensor.float().abs().clamp_min(1e-6)
        assert bool(((after[name].float() - tensor.float()).abs() <= unit).all()), name


def test_another_base_of_the_same_shapes_is_noted(smollm2, smollm2_lora, tmp_path):
    """Shapes cannot tell SmolLM from SmolLM2: a note does, where the adapter names a model of the
    Hub. A local path in the config is neither followed nor copied."""
    message = {
        "hub": "HuggingFaceTB/SmolLM-135M-Instruct",
        "same": f"org/{smollm2.name}",
        "local": "/home/somebody/SmolLM-135M",
    }
    notes = {}
    for name, text in message.items():
        oracle.edit_config(smollm2_lora, tmp_path / name, base_model_name_or_path=text)
        receipt = oracle.merge(smollm2, tmp_path / name, out=tmp_path / f"out-{name}").data
        notes[name] = receipt["notes"]
        assert (
            "somebody"
            not in json.dumps(receipt) + (tmp_path / f"out-{name}" / "README.md").read_text()
        )
    assert any("trained on HuggingFaceTB/SmolLM-135M-Instruct" in note for note in notes["hub"])
    assert not any("trained on" in note for note in notes["same"] + notes["local"])

"""diagnose: each way to spoil a merge is named, and a right one is not."""

import json
import shutil
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import adapterkit
from adapterkit.cli import main
from tests.support import oracle
from tests.support.texts import save_tokenizer


@pytest.fixture
def strong(lora, tmp_path):
    """The adapter with a delta that bfloat16 keeps, at a scale of 4."""
    shutil.copytree(lora, tmp_path / "strong")
    tensors = load_file(lora / "adapter_model.safetensors")
    save_file({k: 2 * v for k, v in tensors.items()}, tmp_path / "strong/adapter_model.safetensors")
    config = json.loads((lora / "adapter_config.json").read_text())
    config["lora_alpha"] = 4 * config["r"]
    (tmp_path / "strong" / "adapter_config.json").write_text(json.dumps(config))
    return tmp_path / "strong"


def kinds(document):
    return {row["kind"] for row in document["findings"]}


@pytest.fixture
def merged(strong, llama, tmp_path):
    def make(weight, name="model"):
        adapterkit.merge(llama, {strong: weight}, out=tmp_path / name)
        return tmp_path / name

    return make


@pytest.mark.parametrize(
    "weight, kind",
    [
        (1, None),
        (2, "merged_twice"),
        (-1, "subtracted"),
        (0.25, "scale"),
        (4, "scale"),
        (0.6, "strength"),
    ],
)
def test_how_much_of_an_adapter_is_in_it(weight, kind, merged, strong, llama):
    document = adapterkit.diagnose(merged(weight), base=llama, adapters=[strong])
    assert document["coefficients"] == [pytest.approx(weight, rel=0.05)]
    assert kinds(document) == ({kind} if kind else set())


def test_two_adapters_are_distinguished(strong, llama, tmp_path):
    other = tmp_path / "other"
    oracle.train(
        oracle.load(oracle.llama, llama), other, seed=5, target_modules=["q_proj", "v_proj"]
    )
    adapterkit.merge(llama, {strong: 1.0, other: 2.0}, out=tmp_path / "both", dtype="fp32")
    document = adapterkit.diagnose(tmp_path / "both", base=llama, adapters=[strong, other])
    assert document["coefficients"] == pytest.approx([1, 2], rel=0.05)
    assert kinds(document) == {"merged_twice"} and document["unexplained"] < 0.01


def test_a_model_without_the_adapter(strong, llama):
    document = adapterkit.diagnose(llama, base=llama, adapters=[strong])
    assert kinds(document) == {"not_merged"} and document["unexplained"] == 0


def test_a_merge_into_another_base_is_found(merged, strong, tmp_path):
    model = oracle.llama()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    oracle.save_base(model, tmp_path / "other", "bf16")
    document = adapterkit.diagnose(merged(1), base=tmp_path / "other", adapters=[strong])
    assert "wrong_base" in kinds(document)


def test_a_wrong_base_is_one_finding_with_all_signs(merged, strong, tmp_path):
    """Its embeddings have other shapes, its weights and the change differ."""
    model: Any = oracle.llama()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=1.0)
    model.resize_token_embeddings(model.config.vocab_size + 8)
    oracle.save_base(model, tmp_path / "other", "bf16")
    document = adapterkit.diagnose(merged(1), base=tmp_path / "other", adapters=[strong])
    (finding,) = [row for row in document["findings"] if row["kind"] != "not_merged"]
    assert finding["kind"] == "wrong_base"
    shapes, weights, change = finding["problem"].split("; ")
    assert shapes == "0 weights of the base are missing, 2 have other shapes"
    assert weights.endswith("of 5 weights that no adapter touches differ")
    assert change.endswith("of the change is no multiple of the adapters' deltas")
    assert len(finding["evidence"].split("; ")) == 3
    assert finding["hint"] == "give the base that it was made of"


def test_training_is_one_finding_with_all_signs(merged, strong, llama):
    """Of a weight that the adapter touches, and of one that it does not."""
    model = merged(1)

    def train(tensors):
        for name in ("model.norm.weight", "model.layers.0.self_attn.q_proj.weight"):
            tensors[name].add_(torch.randn_like(tensors[name]))

    edited(model, train)
    document = adapterkit.diagnose(model, base=llama, adapters=[strong])
    (finding,) = [row for row in document["findings"] if row["kind"] == "other_changes"]
    assert "model.norm" in finding["evidence"] and "no multiple" in finding["problem"]


def edited(model, change):
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


def test_values_and_files(merged, strong, llama):
    model = merged(1)
    edited(model, lambda t: t["model.norm.weight"].__setitem__(3, torch.nan))
    assert kinds(adapterkit.diagnose(model)) == {"not_finite"}
    model = merged(1, "headless")
    edited(model, lambda t: t.pop("lm_head.weight"))
    document = adapterkit.diagnose(model, base=llama)
    assert kinds(document) == {"headers"} and "lm_head" in json.dumps(document)
    model = merged(1, "trained")
    edited(model, lambda t: t["model.norm.weight"].mul_(1.5))
    document = adapterkit.diagnose(model, base=llama, adapters=[strong])
    assert kinds(document) == {"other_changes"} and "model.norm" in json.dumps(document)
    assert kinds(adapterkit.diagnose(model, base=llama)) == set()  # it may be meant
    model = merged(1, "config")
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (model / "config.json").write_text(json.dumps(config))
    assert "quantization" in kinds(adapterkit.diagnose(model))


def test_a_tokenizer_of_another_model(merged, llama, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(llama, base)
    save_tokenizer(base)
    model = merged(1)
    shutil.copy(base / "tokenizer.json", model)
    assert kinds(adapterkit.diagnose(model, base=base)) == set()
    text = json.loads((model / "tokenizer.json").read_text())
    text["added_tokens"] = [*text.get("added_tokens", []), {"content": "<new>", "id": 10**6}]
    (model / "tokenizer.json").write_text(json.dumps(text))
    document = adapterkit.diagnose(model, base=base)
    assert kinds(document) == {"tokenizer"} and len(document["findings"]) == 2


def test_a_double_merge_is_one_finding_with_both_evidences(merged, strong, llama, tmp_path):
    once = merged(1)
    adapterkit.merge(once, strong, out=tmp_path / "twice")
    [finding] = adapterkit.diagnose(tmp_path / "twice", base=llama, adapters=[strong])["findings"]
    assert finding["kind"] == "merged_twice" and "=-1" in finding["command"]
    assert "the factor of its delta" in finding["evidence"]
    assert "the receipts of the model and its base" in finding["evidence"]
    [finding] = adapterkit.diagnose(tmp_path / "twice")["findings"]
    assert finding["kind"] == "history" and "was merged 2 times" in finding["problem"]


def test_the_diagnose_command_exits_1_for_a_merged_adapter(merged, strong, llama):
    model = str(merged(2))
    words = ["diagnose", model, "--base", str(llama), "--adapter", str(strong)]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 1 and "in the model twice" in result.stdout
    assert CliRunner().invoke(main, ["diagnose", model]).exit_code == 0
    assert json.loads(CliRunner().invoke(main, [*words, "--json"]).stdout)["diagnose"] == 1

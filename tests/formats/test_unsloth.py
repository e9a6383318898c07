"""Unsloth's stacks of experts, whose b counted the experts slowest until 2026-09-17."""

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import adapterkit
from adapterkit.core.errors import AdapterkitError, Refused
from adapterkit.runtime import load

GOLDEN = Path(__file__).parent / "golden" / "peft"
FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"
MODELS = ["qwen3_moe", "gpt_oss"]  # matrices (out, in), and (in, out)
GROUPED, RANK_MAJOR = {"lora_B_layout": "grouped_by_expert"}, {"lora_B_layout": "rank_major"}
BY_UNSLOTH = {"auto_mapping": {"unsloth_fixed": True}}


def experts_of(model: str) -> int:
    config = json.loads((GOLDEN / model / "base" / "config.json").read_text())
    return config.get("num_local_experts") or config["num_experts"]


def source(model: str, out: Path, *, grouped: bool = True, card: str = "", **settings) -> Path:
    """PEFT's adapter with the columns of its stacks' b as Unsloth had them."""
    out.mkdir()
    tensors, count = load_file(GOLDEN / model / FILE), experts_of(model)
    for key, b in tensors.items():
        if grouped and ".experts." in key and "lora_B" in key:
            tensors[key] = b.view(len(b), -1, count).mT.reshape(b.shape).contiguous()
    save_file(tensors, out / FILE)
    config = json.loads((GOLDEN / model / CONFIG).read_text())
    (out / CONFIG).write_text(json.dumps(config | settings))
    (out / "README.md").write_text(card)
    return out


def merged(model: str, adapter: Path, out: Path, **options) -> dict:
    adapterkit.merge(GOLDEN / model / "base", adapter, out=out, **options)
    return load_file(out / "model.safetensors")


def model_at(base: Path):
    live = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    live.set_experts_implementation("eager")
    return live


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("model", MODELS)
def test_factors_grouped_by_expert_are_read_alike_by_every_verb(tmp_path, model):
    """merge, convert, inspect and the runtime; PEFT's own model of what is converted; no stale
    marker."""
    adapter, base = source(model, tmp_path / "grouped", **GROUPED), GOLDEN / model / "base"
    expected = merged(model, GOLDEN / model, tmp_path / "expected")
    assert equal(merged(model, adapter, tmp_path / "merged", verify=True), expected)
    adapterkit.convert(adapter, to="peft", out=tmp_path / "plain")
    config = json.loads((tmp_path / "plain" / CONFIG).read_text())
    assert "lora_B_layout" not in config
    assert equal(load_file(tmp_path / "plain" / FILE), load_file(GOLDEN / model / FILE))
    ids = torch.arange(6)[None]
    logits = [
        peft.PeftModel.from_pretrained(model_at(base), one)(ids).logits
        for one in (GOLDEN / model, tmp_path / "plain")
    ]
    live = model_at(base)
    handle = load(live, adapter)
    assert torch.equal(*logits)
    torch.testing.assert_close(live(ids).logits, logits[0], rtol=1e-4, atol=1e-5)
    handle.save(tmp_path / "saved")
    assert equal(merged(model, tmp_path / "saved", tmp_path / "again"), expected)
    modules = [adapterkit.inspect(one)["modules"] for one in (adapter, GOLDEN / model)]
    assert modules[0] == modules[1] and adapterkit.inspect(adapter)["problems"] == []


def test_rank_major_passes(tmp_path):
    adapter = source(MODELS[0], tmp_path / "new", grouped=False, card="unsloth", **RANK_MAJOR)
    expected = merged(MODELS[0], GOLDEN / MODELS[0], tmp_path / "expected")
    assert equal(merged(MODELS[0], adapter, tmp_path / "merged"), expected)


def test_each_parameter_has_its_own_order(tmp_path):
    """As Unsloth says it of those that PEFT packs, beside those that it packs itself."""
    grouped = source(MODELS[0], tmp_path / "grouped")
    tensors, plain = (load_file(one / FILE) for one in (grouped, GOLDEN / MODELS[0]))
    mixed = tmp_path / "mixed"
    shutil.copytree(grouped, mixed)
    inner = lambda key: ".base_layer." in key  # the first parameter's keys
    save_file({k: (tensors if inner(k) else plain)[k] for k in tensors}, mixed / FILE)
    config = json.loads((grouped / CONFIG).read_text())
    first, second = (name.rpartition(".")[2] for name in config["target_parameters"])
    leaves = {"down_proj": RANK_MAJOR, "gate_up_proj": GROUPED}
    config["unsloth_fused_expert_lora"] = {"lora_A_layout": "x", "parameters": leaves}
    (mixed / CONFIG).write_text(json.dumps(config))
    expected = merged(MODELS[0], GOLDEN / MODELS[0], tmp_path / "expected")
    assert {first, second} == leaves.keys()
    assert equal(merged(MODELS[0], mixed, tmp_path / "merged"), expected)


def detail(**orders: object) -> dict:
    """The record of each parameter as Unsloth writes it (unsloth_zoo 2026.10.9)."""
    parameters = {leaf: {"lora_B_layout": one, "num_experts": 3} for leaf, one in orders.items()}
    return {"lora_A_layout": "grouped_by_expert", "parameters": parameters}


def test_the_copy_in_auto_mapping_counts(tmp_path):
    """Which PEFT keeps when it saves the adapter again."""
    both = detail(gate_up_proj="grouped_by_expert", down_proj="grouped_by_expert")
    mapping = {"auto_mapping": {"unsloth_fixed": True, "unsloth_fused_expert_lora": both}}
    adapter = source(MODELS[0], tmp_path / "copied", **mapping)
    expected = merged(MODELS[0], GOLDEN / MODELS[0], tmp_path / "expected")
    assert equal(merged(MODELS[0], adapter, tmp_path / "merged"), expected)
    adapterkit.convert(adapter, to="peft", out=tmp_path / "plain")
    config = json.loads((tmp_path / "plain" / CONFIG).read_text())
    assert config["auto_mapping"] == {"unsloth_fixed": True}
    assert config["lora_B_layout"] == "rank_major"  # still of Unsloth, so the order is named


def test_a_parameter_that_unsloth_does_not_name_is_pefts(tmp_path):
    one = {"unsloth_fused_expert_lora": detail(gate_up_proj="grouped_by_expert")}
    adapter = source(MODELS[0], tmp_path / "one", **one)
    tensors, plain = load_file(adapter / FILE), load_file(GOLDEN / MODELS[0] / FILE)
    inner = {key: one for key, one in tensors.items() if ".base_layer." in key}
    save_file(plain | inner, adapter / FILE)
    expected = merged(MODELS[0], GOLDEN / MODELS[0], tmp_path / "expected")
    assert equal(merged(MODELS[0], adapter, tmp_path / "merged"), expected)


@pytest.mark.parametrize("said, words", [
    ({"lora_B_layout": "by_token"}, "lora_B_layout is 'by_token'"),
    (
        {"unsloth_fused_expert_lora": detail(gate_up_proj="rank_major", down_proj="mixed")},
        "lora_B_layout of down_proj is 'mixed'",
    ),
    (
        {"auto_mapping": {"unsloth_fused_expert_lora": detail(down_proj="by_token")}},
        "lora_B_layout of down_proj is 'by_token'",
    ),
    ({"unsloth_fused_expert_lora": {"parameters": ["down_proj"]}}, "lora_B_layout of unsloth_"),
    ({"unsloth_fused_expert_lora": {"parameters": {"down_proj": {}}}}, "down_proj is None"),
], ids=["flat", "mixed", "copy", "list", "without"])  # fmt: skip
def test_an_unknown_marker_is_refused_by_name(tmp_path, said, words):
    """By every reader; it was left out where another parameter had a known one."""
    adapter = source(MODELS[0], tmp_path / "unknown", **said)
    live = model_at(GOLDEN / MODELS[0] / "base")
    for job in (
        lambda: merged(MODELS[0], adapter, tmp_path / "out"),
        lambda: merged(MODELS[0], adapter, tmp_path / "out", expert_layout="unsloth"),
        lambda: adapterkit.convert(adapter, to="peft", out=tmp_path / "out"),
        lambda: load(live, adapter),
    ):
        with pytest.raises(AdapterkitError, match=words) as caught:
            job()
        assert "save it with a newer Unsloth" in str(caught.value)
    assert words in str(adapterkit.inspect(adapter)["problems"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("said", [
    {"card": "---\ntags:\n- Unsloth\n---\n"}, BY_UNSLOTH,
    {"base_model_name_or_path": "unsloth/Qwen3-30B-A3B"},
], ids=["card", "config", "base"])  # fmt: skip
def test_unsloth_without_a_marker_asks(tmp_path, said):
    """Every reader; each answer gives its own reading, which the output keeps."""
    model = MODELS[0]
    adapter = source(model, tmp_path / "unsloth", **said)
    live = model_at(GOLDEN / model / "base")
    command = f"adapterkit convert {adapter} --to peft --expert-layout unsloth --out for-peft"
    for job in (
        lambda: merged(model, adapter, tmp_path / "refused"),
        lambda: adapterkit.convert(adapter, to="vllm", out=tmp_path / "refused"),
        lambda: adapterkit.combine([adapter, adapter], out=tmp_path / "refused"),
        lambda: load(live, adapter),
    ):
        with pytest.raises(AdapterkitError) as caught:
            job()
        assert str(caught.value).splitlines()[-1] == f"  {command}"
    assert "by Unsloth" in str(adapterkit.inspect(adapter)["problems"])
    for layout, other in (
        ("unsloth", GOLDEN / model),
        ("peft-0.19", source(model, tmp_path / "x")),
    ):
        expected = merged(model, other, tmp_path / f"expected {layout}")
        found = merged(model, adapter, tmp_path / f"merged {layout}", expert_layout=layout)
        assert equal(found, expected)
        out = tmp_path / f"converted {layout}"
        adapterkit.convert(adapter, to="peft", out=out, expert_layout=layout)
        assert equal(merged(model, out, tmp_path / f"again {layout}"), expected)
        adapterkit.combine([out, out], out=tmp_path / f"sum {layout}")
        handle = load(live, tmp_path / f"sum {layout}")
        handle.save(tmp_path / f"saved {layout}")
        handle.load(tmp_path / f"saved {layout}", name="other")
        handle.detach()
    assert not (tmp_path / "refused").exists()


def test_unsloth_without_stacks_asks_nothing(tmp_path):
    """Layers alone; a stack of one matrix for all."""
    adapter = source(MODELS[0], tmp_path / "unsloth", card="unsloth")
    tensors = load_file(adapter / FILE)
    save_file({k: t for k, t in tensors.items() if ".experts." not in k}, adapter / FILE)
    config = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps(config | {"target_parameters": ["mlp.gate.weight"]}))
    merged(MODELS[0], adapter, tmp_path / "merged")


def test_factors_that_may_be_of_several_parameters_need_the_model(tmp_path):
    """Square experts, of which nothing says which are whose: they were left in the order that they
    had."""
    adapter = source(MODELS[0], tmp_path / "grouped", **GROUPED)
    tensors = load_file(adapter / FILE)
    for key in [key for key in tensors if ".experts." in key]:
        a = "lora_A" in key
        tensors[key] = (
            torch.randn(tensors[key].shape[0], 8) if a else torch.randn(8, tensors[key].shape[1])
        )
    save_file(tensors, adapter / FILE)
    command = f"adapterkit convert {adapter} --to peft --base BASE --out for-peft"
    for job in (
        lambda: adapterkit.convert(adapter, to="peft", out=tmp_path / "out"),
        lambda: adapterkit.resize(adapter, rank=1, out=tmp_path / "out"),
    ):
        with pytest.raises(Refused, match="its factors may belong to several parameters") as caught:
            job()
        assert str(caught.value).splitlines()[-1] == f"  {command}"

"""mlx-lm loads what is written for it and computes what PEFT computes; what it trained acts as
there, on tied embeddings too."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file

import adapterkit
from adapterkit.core.errors import AdapterkitError, Refused
from tests.support.adapter_samples import GOLDEN
from tests.support.mlx_models import (
    SEEING,
    by_mlx,
    loaded,
    logits,
    off,
    saved,
    seeing,
    stacks_of,
    trained,
)
from tests.support.usual import usual

pytestmark = pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*:UserWarning")


@pytest.mark.parametrize("kind", ["mixtral", "dots1", "lfm2_moe"])
def test_experts_have_the_names_of_mlx_lm_s_model(kind, tmp_path):
    """There and back."""
    base = saved(kind, tmp_path / "base")
    stacks = stacks_of(loaded(base))
    model = trained(base, tmp_path / "peft", r=3, lora_alpha=6, target_modules=["out_proj"
                    if kind == "lfm2_moe" else "o_proj"], target_parameters=stacks)  # fmt: skip
    expected = logits(model)
    assert off(logits(loaded(base)), expected) > 0.1
    adapterkit.convert(tmp_path / "peft", to="mlx", out=tmp_path / "mlx", base=base)
    assert off(by_mlx(base, tmp_path / "mlx"), expected) < 5e-3  # routed as in bfloat16
    adapterkit.convert(tmp_path / "mlx", to="peft", out=tmp_path / "back", base=base)
    adapterkit.merge(base, tmp_path / "back", out=tmp_path / "merged")
    assert off(logits(loaded(tmp_path / "merged")), expected) < 1e-5


def test_modules_that_mlx_lm_has_not_are_refused(tmp_path):
    base = saved("deepseek_v3", tmp_path / "base")
    trained(base, tmp_path / "peft", r=2, target_modules=["kv_b_proj", "o_proj"])
    with pytest.raises(Refused, match="2 modules have no name there: .*kv_b_proj"):
        adapterkit.convert(tmp_path / "peft", to="mlx", out=tmp_path / "mlx", base=base)
    plan = adapterkit.convert(tmp_path / "peft", to="mlx", out=tmp_path / "mlx", dry_run=True)
    assert any("kv_b_proj" in note and "deepseek_v3" in note for note in plan.notes)
    base = saved("llama", tmp_path / "llama")
    trained(base, tmp_path / "own", r=2, target_modules=["o_proj"])
    file = tmp_path / "own/adapter_model.safetensors"
    tensors = load_file(file)
    save_file({k.replace("self_attn", "ffn.experts.0"): v for k, v in tensors.items()}, file)
    with pytest.raises(AdapterkitError, match="2 modules have no name there: .*experts"):
        adapterkit.convert(tmp_path / "own", to="mlx", out=tmp_path / "mlx")


SEES = transformers.AutoModelForImageTextToText
TEXT = r".*language_model\.(?!.*lm_head).*proj(_\w+)?"


@pytest.mark.parametrize("kind", usual(SEEING, {"gemma4", "qwen3_vl", "mistral3"}))
def test_a_language_model_inside_another_has_the_names_of_mlx_lm(kind, tmp_path):
    """There and back; mlx-lm itself is 0.01 off on Gemma 4."""
    base = seeing(kind, tmp_path / "base")
    model = trained(base, tmp_path / "peft", auto=SEES, r=2, target_modules=TEXT)
    expected, apart = logits(model), 0.02 if kind == "gemma4" else 1e-5
    assert off(logits(loaded(base, SEES)), expected) > 0.1
    with pytest.raises(Refused, match="modules inside a larger model"):
        adapterkit.convert(tmp_path / "peft", to="mlx", out=tmp_path / "mlx")
    adapterkit.convert(tmp_path / "peft", to="mlx", out=tmp_path / "mlx", base=base)
    assert off(by_mlx(base, tmp_path / "mlx"), expected) < apart
    adapterkit.convert(tmp_path / "mlx", to="peft", out=tmp_path / "back", base=base)
    live = PeftModel.from_pretrained(loaded(base, SEES), tmp_path / "back")
    assert off(logits(live.eval()), expected) < 1e-6
    adapterkit.merge(base, tmp_path / "mlx", out=tmp_path / "merged")
    assert off(logits(loaded(tmp_path / "merged", SEES)), expected) < 1e-5
    noted = adapterkit.convert(tmp_path / "mlx", to="peft", out=tmp_path / "bare").data["notes"]
    assert any("inside a larger model" in note for note in noted)


def test_one_that_was_trained_by_itself(tmp_path):
    base = seeing("qwen3_5", tmp_path / "base")
    targets = ["q_proj", "in_proj_qkv", "down_proj", "lm_head"]
    model = trained(base, tmp_path / "peft", r=2, target_modules=targets)
    assert type(model.get_base_model()).__name__ == "Qwen3_5ForCausalLM"
    adapterkit.convert(tmp_path / "peft", to="mlx", out=tmp_path / "mlx", base=base)
    assert off(by_mlx(base, tmp_path / "mlx"), logits(model)) < 1e-5


TIED: dict[str, Any] = {"target_modules": ["embed_tokens", "q_proj"], "r": 3, "lora_alpha": 6}


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> Path:
    return saved("llama", tmp_path_factory.mktemp("tied") / "base", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return saved("llama", tmp_path_factory.mktemp("plain") / "base")


def test_embeddings_that_mlx_lm_trained_on_a_tied_base_act_in_the_head(tied, tmp_path):
    """Merged, and in PEFT's layout."""
    shutil.copytree(mlx_adapter(tied, tmp_path), tmp_path / "mlx")
    expected = by_mlx(tied, tmp_path / "mlx")
    receipt = adapterkit.merge(tied, tmp_path / "mlx", out=tmp_path / "merged")
    assert off(logits(loaded(tmp_path / "merged")), expected) < 1e-5
    config = json.loads((tmp_path / "merged/config.json").read_text())
    assert config["tie_word_embeddings"] is True, receipt.data["notes"]
    adapterkit.convert(tmp_path / "mlx", to="peft", out=tmp_path / "peft", base=tied)
    adapterkit.merge(tied, tmp_path / "peft", out=tmp_path / "again")
    assert off(logits(loaded(tmp_path / "again")), expected) < 1e-5
    adapterkit.convert(tmp_path / "peft", to="mlx", out=tmp_path / "back", base=tied)
    assert off(by_mlx(tied, tmp_path / "back"), expected) < 1e-5


def mlx_adapter(base: Path, place: Path) -> Path:
    """One of embeddings and queries, as mlx-lm would train it."""
    trained(base, place / "source", **TIED)
    adapterkit.convert(place / "source", to="mlx", out=place / "written")  # of no base
    return place / "written"


def test_adapters_that_a_tied_base_would_apply_twice_are_refused(tied, tmp_path):
    trained(tied, tmp_path / "peft", **TIED)
    with pytest.raises(Refused, match="one weight for embeddings and head"):
        adapterkit.convert(tmp_path / "peft", to="mlx", out=tmp_path / "mlx", base=tied)
    trained(tied, tmp_path / "head", **{**TIED, "target_modules": ["lm_head"]})
    with pytest.raises(Refused, match="one weight for embeddings and head"):
        adapterkit.convert(tmp_path / "head", to="mlx", out=tmp_path / "mlx", base=tied)


def test_without_a_base_a_note_lists_modules_that_depend_on_it(plain, tmp_path):
    model = trained(plain, tmp_path / "peft", **TIED)
    notes = adapterkit.convert(tmp_path / "peft", to="mlx", out=tmp_path / "mlx").data["notes"]
    assert any("in the head" in note and "--base" in note for note in notes)
    told = adapterkit.convert(tmp_path / "peft", to="mlx", out=tmp_path / "told", base=plain)
    assert not any("in the head" in note for note in told.data["notes"])
    assert off(by_mlx(plain, tmp_path / "told"), logits(model)) < 1e-5
    back = adapterkit.convert(tmp_path / "mlx", to="peft", out=tmp_path / "back")
    assert any("in the head" in note and "--base" in note for note in back.data["notes"])


def test_a_scale_with_an_alpha_may_be_the_older_one(tmp_path):
    """mlx-lm up to 0.14.0 multiplied the scale by alpha / rank."""
    shutil.copytree(GOLDEN / "mlx/lora", tmp_path / "mlx")
    config = json.loads((tmp_path / "mlx/adapter_config.json").read_text())
    config["lora_parameters"]["alpha"] = 12.0
    (tmp_path / "mlx/adapter_config.json").write_text(json.dumps(config))
    receipt = adapterkit.convert(tmp_path / "mlx", to="peft", out=tmp_path / "new")
    assert any("0.14.0" in note and "--alpha 30" in note for note in receipt.data["notes"])
    older = adapterkit.convert(tmp_path / "mlx", to="peft", out=tmp_path / "old", alpha=30.0)
    assert not any("0.14.0" in note for note in older.data["notes"])
    base = saved("llama", tmp_path / "base", vocab_size=20)
    merged = adapterkit.merge(base, tmp_path / "mlx", out=tmp_path / "merged").data["notes"]
    assert any("0.14.0" in note for note in merged)
    alphas = [
        json.loads((tmp_path / name / "adapter_config.json").read_text())["lora_alpha"]
        for name in ("new", "old")
    ]
    assert alphas == [2.5 * 3, 2.5 * 12]
    with pytest.raises(Refused, match="--alpha"):  # where nothing is open
        adapterkit.convert(GOLDEN / "mlx/lora", to="peft", out=tmp_path / "no", alpha=30.0)
    assert torch.equal(*(load_file(tmp_path / n / "adapter_model.safetensors").popitem()[1]
                         for n in ("new", "old")))  # fmt: skip

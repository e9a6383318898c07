"""verify --data: the losses of an output and of its inputs, against transformers on the same
texts."""

import shutil

import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM

import adapterkit
from adapterkit.core.errors import MultipleErrors, Refused
from tests.support import oracle
from tests.support.forks import command
from tests.support.texts import save_tokenizer, write_rows

TEXTS = ["some words, and more of them", "a cat in a house", "it rains all day, or does it?"]


@pytest.fixture
def home(tmp_path, cached_folder):
    """A base with a tokenizer, an adapter, texts, and a merge of them."""

    def build(folder):
        oracle.save_base(oracle.llama(), folder / "base", "bf16")
        save_tokenizer(folder / "base")
        oracle.train(oracle.load(oracle.llama, folder / "base"), folder / "style",
                     size=0.3, target_modules=oracle.LINEAR)  # fmt: skip
        write_rows(folder / "texts.jsonl", *({"text": text} for text in TEXTS))
        adapterkit.merge(folder / "base", (folder / "style", 0.5), out=folder / "merged")

    return shutil.copytree(cached_folder("scored", build), tmp_path / "home")


def loss_of(base, adapter=None, weight=1.0):
    """Nats per token, by transformers and PEFT."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter)
        for module in model.modules():
            if isinstance(module, LoraLayer):
                module.scale_layer(weight)
    total, count = 0.0, 0
    for text in TEXTS:
        row = torch.tensor([tokens(base, text)])
        with torch.no_grad():
            logits = model(row).logits[0, :-1].double()
        total += float(torch.nn.functional.cross_entropy(logits, row[0, 1:], reduction="sum"))
        count += row.shape[1] - 1
    return total / count


def tokens(base, text):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base)(text)["input_ids"]


def losses(result):
    return {row["model"]: row["loss"]["value"] for row in result["score"]["rows"]}


def test_verify_with_texts_measures_the_output_its_base_and_the_base_with_the_adapter(home):
    result = adapterkit.verify(home / "merged", data=home / "texts.jsonl")
    found, base = losses(result), "base"
    assert found[str(home / "merged")] == pytest.approx(loss_of(home / "merged"), abs=1e-5)
    assert found[base] == pytest.approx(loss_of(home / "base"), abs=1e-5)
    live = loss_of(home / "base", home / "style", 0.5)
    assert found[f"{base} + style"] == pytest.approx(live, abs=1e-5)
    assert abs(live - found[base]) > 1e-3
    rows = {row["model"]: row for row in result["score"]["rows"]}
    assert rows[f"{base} + style"]["kl"]["value"] == 0
    assert 0 < rows[str(home / "merged")]["kl"]["value"] < rows[base]["kl"]["value"] / 10


def test_verify_measures_the_inputs_that_the_options_name_if_they_have_moved(home, tmp_path):
    (home / "base").rename(tmp_path / "elsewhere")
    (home / "style").rename(tmp_path / "other")
    inputs = {"base": tmp_path / "elsewhere", "adapters": [tmp_path / "other"]}
    result = adapterkit.verify(home / "merged", data=home / "texts.jsonl", **inputs)
    live = loss_of(tmp_path / "elsewhere", tmp_path / "other", 0.5)
    assert losses(result)["elsewhere + other"] == pytest.approx(live, abs=1e-5)
    assert result["rows"] > 0


def test_verify_measures_only_the_modules_that_a_merge_changed(home):
    adapterkit.merge(home / "base", home / "style", out=home / "few", include="q_proj",
                     dtype="fp32")  # fmt: skip
    result = adapterkit.verify(home / "few", data=home / "texts.jsonl")
    found = losses(result)
    assert found[str(home / "few")] == pytest.approx(found["base + style"], abs=1e-6)


def test_verify_measures_a_quantized_model_next_to_the_one_it_was_made_of(home):
    adapterkit.quantize(home / "base", to="nf4", out=home / "nf4")
    result = adapterkit.verify(home / "nf4", data=home / "texts.jsonl", samples=2)
    assert [*losses(result)] and set(losses(result)) == {str(home / "nf4"), "base"}
    assert result["score"]["data"]["samples"] == 2


def test_verify_refuses_to_measure_without_its_inputs_or_with_others(home, tmp_path):
    data = home / "texts.jsonl"
    adapterkit.resize(home / "style", rank=2, out=home / "small")
    with pytest.raises(Refused, match="an output of resize: its loss is not measured"):
        adapterkit.verify(home / "small", data=data)
    shutil.rmtree(home / "style")
    oracle.train(oracle.load(oracle.llama, home / "base"), home / "style", r=2)
    with pytest.raises(Refused, match="style is not what was merged"):
        adapterkit.verify(home / "merged", data=data)
    shutil.rmtree(home / "style")
    (home / "base").rename(tmp_path / "elsewhere")
    with pytest.raises((Refused, MultipleErrors)) as caught:
        adapterkit.verify(home / "merged", data=data)
    text = str(caught.value)
    assert "there is no base" in text and "there is no style" in text
    assert "give --base and --adapter" in text


def test_the_command_prints_the_table_after_the_checks(home):
    done = command("verify", str(home / "merged"), "--data", str(home / "texts.jsonl"))
    assert done.returncode == 0, done.stderr
    assert "match the receipt" in done.stderr
    assert "KL per token" in done.stdout and "perplexity" in done.stdout

"""diagnose --data: a model whose loss is not that of its base with the adapter is found."""

import json
import random
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import adapterkit
from adapterkit.core.errors import Refused
from tests.support import oracle
from tests.support.forks import command
from tests.support.texts import save_tokenizer, write_rows

HEAD = "lm_head.weight"
WORDS = "the cat and the dog sleep in the house because it rains all day".split()


@pytest.fixture
def home(tmp_path, cached_folder):
    """A base, an adapter that learned texts, and other texts of the same words."""

    def build(folder):
        oracle.save_base(oracle.llama(max_position_embeddings=128), folder / "base", "bf16")
        tokens = AutoTokenizer.from_pretrained(save_tokenizer(folder / "base"))
        draw = random.Random(1)
        texts = [" ".join(draw.choices(WORDS, k=8)) for _ in range(40)]
        write_rows(folder / "texts.jsonl", *({"text": text} for text in texts[20:]))
        rows = [tokens(text)["input_ids"] for text in texts[:20]]
        ids = torch.tensor([row[: min(map(len, rows))] for row in rows])
        model = oracle.load(oracle.llama, folder / "base").float()
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=oracle.LINEAR)
        model = peft.get_peft_model(model, config)
        trained = [value for value in model.parameters() if value.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=5e-3)
        for _ in range(30):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.save_pretrained(folder / "style")

    return shutil.copytree(cached_folder("learned", build), tmp_path / "home")


@pytest.fixture
def inputs(home):
    return {"base": home / "base", "adapters": home / "style", "data": home / "texts.jsonl"}


def found(model, inputs):
    rows = adapterkit.diagnose(model, **inputs)["findings"]
    return [row for row in rows if row["kind"] == "predictions"]


def test_a_right_merge_predicts_as_the_base_with_the_adapter(home, inputs):
    adapterkit.merge(home / "base", home / "style", out=home / "right")
    assert adapterkit.diagnose(home / "right", **inputs)["findings"] == []


def test_a_model_without_the_adapter_is_found_by_its_loss(home, inputs):
    (row,) = found(home / "base", inputs)
    assert row["problem"] == "the model does not do what base and adapter do together"
    score = adapterkit.score([home / "base"], data=inputs["data"], adapters=inputs["adapters"])
    losses = {one["model"]: one["loss"]["value"] for one in score["rows"]}
    base, live = losses[str(home / "base")], losses[f"{home / 'base'} + style"]
    numbers = f"loss {base:.4f} nats per token; the base with the adapters has {live:.4f}"
    assert row["evidence"].startswith(numbers) and "20 samples" in row["evidence"]
    assert str(home / "style") in row["command"] and "--rounding stochastic" in row["command"]


def test_a_merge_that_four_bits_lost_is_found_by_its_loss(home, inputs):
    adapterkit.quantize(home / "base", to="nf4", out=home / "nf4")
    adapterkit.merge(home / "nf4", (home / "style", 1e-3), out=home / "lost")
    adapterkit.merge(home / "nf4", home / "style", out=home / "in-16-bits", dequantize=True)
    assert found(home / "lost", inputs | {"base": home / "nf4"})
    assert not found(home / "in-16-bits", inputs | {"base": home / "nf4"})


def test_a_model_that_predicts_nonsense_or_nothing_finite_is_found(home, inputs):
    tensors = load_file(home / "base" / "model.safetensors")
    shutil.copytree(home / "base", home / "broken")
    for factor, finding in ((1e3, "the model does not do"), (1e37, "not finite, for 20 of 20")):
        changed = tensors | {key: tensors[key] * factor for key in ("model.norm.weight", HEAD)}
        save_file(changed, home / "broken" / "model.safetensors")
        (row,) = found(home / "broken", inputs)
        assert finding in row["problem"]


def test_texts_for_diagnose_need_an_adapter(home):
    with pytest.raises(Refused, match="--data is given without --adapters"):
        adapterkit.diagnose(home / "base", data=home / "texts.jsonl")


def test_the_command_prints_the_losses_and_exits_with_1(home, inputs):
    words = ("--base", str(home / "base"), "--adapter", str(home / "style"))
    data = ("--data", str(home / "texts.jsonl"), "--json")
    done = command("diagnose", str(home / "base"), *words, *data)
    assert done.returncode == 1, done.stderr
    kinds = [row["kind"] for row in json.loads(done.stdout)["findings"]]
    assert kinds == ["not_merged", "predictions"]

"""What cannot be done is refused before anything changes."""

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from adapterkit import LoraConfig
from adapterkit.core.errors import AdapterkitError
from adapterkit.runtime import Adapters, attach, load
from tests.support.live import llama, tokens

pytestmark = pytest.mark.quick

CONFIG = LoraConfig(4, 8, ["q_proj", "v_proj"], init=False)
IDS = tokens()


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Folders with the same adapter: as it is, and with one thing wrong."""
    root = tmp_path_factory.mktemp("adapters")
    adapters = attach(llama(), CONFIG, seed=1)
    adapters.save(root / "whole")
    config = json.loads((root / "whole" / "adapter_config.json").read_text("utf-8"))
    stored = load_file(root / "whole" / "adapter_model.safetensors")
    keys = sorted(stored)

    def write(name: str, tensors: dict, **changes) -> None:
        (root / name).mkdir()
        save_file(tensors, root / name / "adapter_model.safetensors")
        text = json.dumps(config | changes)
        (root / name / "adapter_config.json").write_text(text, "utf-8")

    write("a key more", stored | {"base_model.model.model.norm.lora_X.weight": torch.ones(2)})
    write("a key less", {key: stored[key] for key in keys[1:]})
    write("other names", {key.replace("model.layers", "decoder.h"): stored[key] for key in keys})
    write("another width", {key: stored[key].repeat(1, 2) for key in keys if "lora_A" in key}
          | {key: stored[key] for key in keys if "lora_B" in key})  # fmt: skip
    write("another rank", stored, r=8)
    write(
        "on a norm",
        {key.replace("self_attn.q_proj", "input_layernorm"): stored[key] for key in keys},
    )
    write("not finite", {key: stored[key] * float("nan") for key in keys})
    write("an unknown setting", stored, use_magic=True)
    write("lora_ga", stored, init_lora_weights="lora_ga")
    return root


@pytest.fixture
def adapters(saved) -> Adapters:
    """One trained adapter, active, and another one loaded."""
    adapters = attach(llama(), CONFIG, name="sft", seed=2)
    adapters.load(saved / "whole", name="dpo")
    return adapters


def state(adapters: Adapters) -> list:
    """All of a model that a refused call must leave as it was."""
    with torch.no_grad():
        logits = adapters.model(IDS).logits
    flags = {name: p.requires_grad for name, p in adapters.model.named_parameters()}
    names = [adapters.names, adapters.active, adapters.merged]
    modules = [name for name, _ in adapters.model.named_modules()]
    return [logits, flags, names, modules, list(adapters.model.state_dict())]


def unchanged(before: list, after: list) -> bool:
    return torch.equal(before[0], after[0]) and before[1:] == after[1:]


Action = Callable[[Adapters, Path], object]


def merged(h: Adapters, *_) -> None:
    h.merge("sft")


def nothing(*_) -> None:
    return


def training(h: Adapters, *_) -> None:
    h.model.train()


def enter(manager) -> None:
    with manager:
        pass


def call_rows(h: Adapters, names: list) -> None:
    with torch.no_grad(), h.rows(names):
        h.model(IDS)


MISUSE: list[tuple[str, Action, Action, str]] = [
    # what is wrong, what is done before, what is refused, words of the message
    ("missing key", nothing, lambda h, p: h.load(p / "a key less", name="x"), "both factors"),
    ("extra key", nothing, lambda h, p: h.load(p / "a key more", name="x"), "lora_X"),
    ("wrong names", nothing, lambda h, p: h.load(p / "other names", name="x"), "decoder.h.0"),
    ("wrong width", nothing, lambda h, p: h.load(p / "another width", name="x"), "shapes"),
    ("wrong rank", nothing, lambda h, p: h.load(p / "another rank", name="x"), "rank 4"),
    ("wrong layer", nothing, lambda h, p: h.load(p / "on a norm", name="x"), "LlamaRMSNorm"),
    ("not finite", nothing, lambda h, p: h.load(p / "not finite", name="x"), "not finite"),
    ("unknown setting", nothing,
     lambda h, p: h.load(p / "an unknown setting", name="x"), "use_magic"),
    ("changed base", nothing, lambda h, p: h.load(p / "lora_ga", name="x"), "changed base"),
    ("no such folder", nothing,
     lambda h, p: h.load(p / "none" / "there", name="x"), "no such path"),
    ("name in use", nothing, lambda h, p: h.load(p / "whole", name="dpo"), "there already"),
    ("attach in use", nothing, lambda h, p: h.attach(CONFIG, name="sft"), "there already"),
    ("empty name", nothing, lambda h, p: h.attach(CONFIG, name=""), "name ''"),
    ("unknown targets", nothing,
     lambda h, p: h.attach(LoraConfig(targets=["q_porj", "x"]), name="x"), "q_porj"),
    ("layer without factors", nothing,
     lambda h, p: h.attach(LoraConfig(targets=["norm"]), name="x"), "norm"),
    ("second handle", nothing, lambda h, p: attach(h.model, CONFIG), "has adapters already"),
    ("second load", nothing, lambda h, p: load(h.model, p / "whole"), "has adapters already"),
    ("activate unknown", nothing, lambda h, p: h.activate("stf"), "did you mean"),
    ("activate unknown ones", nothing, lambda h, p: h.activate({"a": 1, "b": 1}), "a, b"),
    ("weight", nothing, lambda h, p: h.activate({"sft": float("nan")}), "weight nan"),
    ("weight text", nothing, lambda h, p: h.activate({"sft": "1"}), "weight '1'"),
    ("activate a number", nothing, lambda h, p: h.activate(3), "adapters 3"),
    ("activate numbers", nothing, lambda h, p: h.activate([3]), "adapters [3]"),
    ("attach nothing", nothing, lambda h, p: h.attach(None, name="x"), "NoneType"),
    ("attach another type", nothing,
     lambda h, p: h.attach(import_module("peft").LoHaConfig(target_modules=["v"]), name="x"),
     "LOHA"),
    ("attach settings of PEFT alone", nothing,
     lambda h, p: h.attach({"target_modules": ["q_proj"], "use_qalora": True}, name="x"), "QALoRA"),
    ("attach loftq_config", nothing,
     lambda h, p: h.attach({"r": 4, "loftq_config": {"loftq_bits": 4}}, name="x"), "loftq"),
    ("attach unknown settings", nothing, lambda h, p: h.attach({"rnk": 4}, name="x"), "rank"),
    ("merge unknown", nothing, lambda h, p: h.merge("x"), "no adapter"),
    ("merge twice", merged, lambda h, p: h.merge("dpo"), "already merged"),
    ("merge again", merged, lambda h, p: h.merge("sft"), "already merged"),
    ("merge nothing", lambda h, p: h.activate(None), lambda h, p: h.merge(), "no adapter"),
    ("unmerge nothing", nothing, lambda h, p: h.unmerge(), "nothing is merged"),
    ("activate merged", merged, lambda h, p: h.activate("sft"), "merged"),
    ("activate another", merged, lambda h, p: h.activate("dpo"), "sft is merged"),
    ("activate none", merged, lambda h, p: h.activate(None), "sft is merged"),
    ("attach beside", merged, lambda h, p: h.attach(CONFIG, name="x"), "sft is merged"),
    ("load beside", merged, lambda h, p: h.load(p / "whole", name="x"), "sft is merged"),
    ("swap beside", merged, lambda h, p: h.swap("dpo", p / "whole"), "sft is merged"),
    ("rescale beside", merged, lambda h, p: h.rescale(2.0, name="dpo"), "sft is merged"),
    ("combine beside", merged, lambda h, p: h.combine({"dpo": 1.0}, name="x"), "sft is merged"),
    ("save merged", merged, lambda h, p: h.save(p / "out", name="sft"), "merged"),
    ("save unknown", nothing, lambda h, p: h.save(p / "out", name="x"), "no adapter"),
    ("save to the Hub", nothing, lambda h, p: h.save("hf://me/x", name="sft"), "on the Hub"),
    ("save which", lambda h, p: h.activate(None), lambda h, p: h.save(p / "out"), "2 adapters"),
    ("delete active", nothing, lambda h, p: h.delete("sft"), "is active"),
    ("delete merged", merged, lambda h, p: h.delete("sft"), "is merged"),
    ("delete unknown", nothing, lambda h, p: h.delete("x"), "no adapter"),
    ("rows too few", lambda h, p: h.activate("dpo"), lambda h, p: call_rows(h, ["sft"]), "1 name"),
    ("rows too many", lambda h, p: h.activate("dpo"),
     lambda h, p: call_rows(h, ["sft", None, "dpo"]), "3 names"),
    ("rows unknown", nothing, lambda h, p: enter(h.rows(["x", None])), "no adapter"),
    ("rows merged", merged, lambda h, p: enter(h.rows(["dpo", None])), "merged"),
    ("combine unknown", nothing, lambda h, p: h.combine({"x": 1.0}, name="y"), "no adapter"),
    ("combine in use", nothing, lambda h, p: h.combine({"sft": 1.0}, name="dpo"), "there already"),
    ("combine method", nothing,
     lambda h, p: h.combine({"sft": 1.0}, name="y", method="tyes"), "ties"),
    ("combine option", nothing,
     lambda h, p: h.combine({"sft": 1.0}, name="y", method="ties", dense=0.5), "dense"),
    ("rescale", nothing, lambda h, p: h.rescale(float("inf"), name="sft"), "inf"),
    ("parameters", nothing, lambda h, p: list(h.parameters("x")), "no adapter"),
]  # fmt: skip


@pytest.mark.parametrize("case", MISUSE, ids=[case[0] for case in MISUSE])
def test_refused_and_nothing_changes(case, adapters, saved):
    _, prepare, action, words = case
    prepare(adapters, saved)
    before = state(adapters)
    with pytest.raises(AdapterkitError) as caught:
        action(adapters, saved)
    assert words in str(caught.value), str(caught.value)
    assert unchanged(before, state(adapters))
    assert not (saved / "out").exists()


@pytest.mark.parametrize("weight", [np.float32(0.5), np.int64(2), torch.tensor(0.25)], ids=repr)
def test_numbers_of_other_libraries(weight, adapters):
    adapters.activate({"sft": weight})
    assert adapters.active == {"sft": float(weight)} and type(adapters.active["sft"]) is float
    adapters.rescale(weight, name="sft")


def test_rows_while_training(adapters):
    adapters.model.train()
    before = state(adapters)
    with pytest.raises(AdapterkitError, match="train"), adapters.rows(["sft", None]):
        adapters.model(IDS)
    assert unchanged(before, state(adapters))


@pytest.mark.parametrize("name", ["another width", "other names", "a key less"])
def test_a_refused_load_leaves_no_trace_on_a_plain_model(name, saved):
    model = llama()
    expected, names = model(IDS).logits, [name for name, _ in model.named_modules()]
    with pytest.raises(AdapterkitError):
        load(model, saved / name)
    assert torch.equal(model(IDS).logits, expected)
    assert [name for name, _ in model.named_modules()] == names
    assert all(p.requires_grad for p in model.parameters())
    load(model, saved / "whole")  # and is free for another try


def test_a_model_of_another_size(saved):
    model = llama(hidden_size=64, intermediate_size=96)
    with pytest.raises(AdapterkitError, match="shapes") as caught:
        load(model, saved / "whole")
    assert "4 modules do not fit the model" in str(caught.value)  # all of them


def test_a_model_of_another_type(saved):
    with pytest.raises(AdapterkitError, match=r"self_attn.q_proj"):
        load(nn.Sequential(nn.Linear(4, 4)), saved / "whole")


def test_unmerge_restores_the_active_adapters(adapters):
    """One of two active ones merged, the other beside it; refused calls in between."""
    adapters.activate({"sft": 0.5, "dpo": 2.0})
    before = state(adapters)
    adapters.merge({"sft": 0.5})
    for names in ("dpo", None, {"dpo": 1.0}):
        with pytest.raises(AdapterkitError, match="unmerge first"):
            adapters.activate(names)
    adapters.unmerge()
    assert unchanged(before, state(adapters))

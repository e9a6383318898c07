"""LoraConfig: values, refusals, adapter_config.json."""

import copy
import dataclasses
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import adapterkit
from adapterkit import LoraConfig, MultipleErrors, Refused
from adapterkit.core.adapter.config import PEFT_DEFAULTS
from adapterkit.verbs.shared.lora_config import OUR_NAMES

pytestmark = pytest.mark.quick

CONFIGS = [
    LoraConfig(),
    LoraConfig(16, 32, "all-linear"),
    LoraConfig(4, 0.5, r".*\.(q|v)_proj", rslora=True, dropout=0.1, bias="all"),
    LoraConfig(targets=["q_proj"], dora=True, exclude=["lm_head"], layers=[0, 2], init="pissa"),
    LoraConfig(targets=["q"], layers=1, layers_pattern=["h", "layers"], exclude=r".*\.0\..*"),
    LoraConfig(targets=["q"], lora_bias=True, init=False, bias="lora_only"),
    LoraConfig(targets=["q"], rank_pattern={"^a.q": 3, "b": 5}, alpha_pattern={"b": 0.5, "c": 7}),
    LoraConfig(targets=[], parameters=["experts.up", "experts.down"], rank_pattern={"up": 2}),
    LoraConfig(targets=[], modules_to_save=["lm_head"], task_type="CAUSAL_LM"),
    LoraConfig(targets=["q"], trainable_tokens=[5, 3], tie=True, init="gaussian"),
    LoraConfig(targets=["q"], trainable_tokens={"wte": [5, 3], "head": [1]}, init="pissa_niter_4"),
    LoraConfig(targets=["q"], layer_replication=[(0, 4), (2, 5)], invocation_tokens=[7, 7, 1]),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_a_config_comes_back_from_its_file(config):
    stored = config.to_peft("org/base")
    assert set(stored) == set(PEFT_DEFAULTS) and stored["base_model_name_or_path"] == "org/base"
    assert LoraConfig.from_peft(stored, "adapter_config.json") == config


@pytest.mark.parametrize("config", CONFIGS)
def test_a_config_is_a_value(config):
    for other in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config)):
        assert other == config
    assert dataclasses.replace(config) == config
    assert dataclasses.replace(config, rank=77) != config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.rank = 3


def test_lists_of_all_kinds_are_tuples():
    config = LoraConfig(targets={"b", "a"}, layers=3, layers_pattern="h", exclude=("x", "x"))
    assert (config.targets, config.layers, config.layers_pattern) == (("a", "b"), (3,), ("h",))
    assert config.exclude == ("x",)
    assert LoraConfig(targets=["a"], exclude=[], layers=[], modules_to_save=()) == LoraConfig(
        targets=["a"]
    )
    assert LoraConfig(targets="All-Linear").targets == "all-linear"
    tokens = {"a": [2, 1]}
    config = LoraConfig(targets=["q"], trainable_tokens=tokens, rank_pattern={"q": 2})
    assert config.trainable_tokens == {"a": (2, 1)}
    tokens["a"].append(3)
    assert config.trainable_tokens == {"a": (2, 1)}


INVALID = {
    "rank": [0, -1, 1.5, True, "8", None],
    "alpha": [float("nan"), float("inf"), "8", True, None],
    "targets": ["", "(", [1], [""], 3, b"q"],
    "rslora": [1, None, "yes"],
    "dora": [0],
    "dropout": [-0.1, 1.0, 1.5, "0", True, None],
    "bias": ["lora", True, None, ["none"]],
    "lora_bias": [1],
    "init": ["unknown", True, None, 0, "pissa_niter", "pissa_niter_x"],
    "init_options": [["niter"], {"niter": None}, {"niter": float("nan")}, {1: 2}, None],
    "rank_pattern": [{"a": 0}, {"a": 1.5}, {"(": 2}, {1: 2}, ["a"], None],
    "alpha_pattern": [{"a": "1"}, {"a": float("nan")}, {"(": 2}, None],
    "exclude": ["[", [3], {"a": 1}],
    "layers": [-1, [1.5], "1", [True], True],
    "layers_pattern": ["(", [3]],
    "parameters": ["experts", [1], [""]],
    "modules_to_save": ["head", [None]],
    "trainable_tokens": [[], [-1], [1, 1], {}, {"a": []}, {"a": [1, 1]}, {1: [1]}, 5, "5"],
    "tie": ["no"],
    "layer_replication": [[(1,)], [(3, 1)], [(0, 0)], [(0, 10**9)], 5, [("0", "1")]],
    "invocation_tokens": [[], [-1], ["a"], 7],
    "task_type": ["CAUSAL", 3],
}


@pytest.mark.parametrize("name, value", [(n, v) for n, values in INVALID.items() for v in values])
def test_invalid_values_are_refused(name, value):
    with pytest.raises(Refused, match=f"LoraConfig: {name}"):
        LoraConfig(**{"targets": ["q"]} | {name: value})


def test_all_settings_have_invalid_values():
    assert set(INVALID) == {field.name for field in dataclasses.fields(LoraConfig)}


def test_all_invalid_values_at_once():
    with pytest.raises(MultipleErrors) as caught:
        LoraConfig(
            0, "8", 3, dropout=2, bias="some", layers_pattern=["h"], dora=True, lora_bias=True
        )
    text = str(caught.value)
    for name in ("rank = 0", "alpha = '8'", "targets = 3", "dropout = 2", "bias = 'some'"):
        assert name in text
    assert "dora = True and lora_bias = True" in text and "layers_pattern" in text
    assert len(caught.value.errors) == 7


def test_an_invalid_setting_is_not_reported_as_a_conflict():
    with pytest.raises(Refused) as caught:
        LoraConfig(targets=["q"], layers=-1, layers_pattern="h")
    assert not isinstance(caught.value, MultipleErrors)


def test_a_config_without_modules_as_peft_writes_it():
    stored = LoraConfig(targets=[], modules_to_save=["head"]).to_peft()
    assert stored["target_modules"] == "dummy-target-modules"
    assert LoraConfig(targets=[], parameters=["up"]).to_peft()["target_modules"] == []


def test_options_of_an_init():
    with pytest.raises(Refused, match=r"init default: unknown options niter\n.*no options"):
        LoraConfig(init_options={"niter": 2})
    with pytest.raises(Refused, match=r"init pissa: unknown options nitre"):
        LoraConfig(init="pissa", init_options={"nitre": 2})
    config = LoraConfig(init="pissa", init_options={"niter": 2})
    assert config.to_peft()["init_lora_weights"] == "pissa_niter_2"
    assert LoraConfig(init="pissa").to_peft()["init_lora_weights"] == "pissa"
    with pytest.raises(Refused, match="init_options for eva_config"):
        LoraConfig(init="eva", eva_config={"rho": 2.0})


CONFLICTS = [
    ({"parameters": ["p"], "dora": True}, "parameters.* and dora"),
    ({"parameters": ["p"], "dropout": 0.1}, "parameters.* and dropout"),
    ({"parameters": ["p"], "lora_bias": True}, "parameters.* and lora_bias"),
    ({"parameters": ["p"], "invocation_tokens": [1]}, "parameters.* and invocation_tokens"),
    ({"dora": True, "lora_bias": True}, "dora = True and lora_bias"),
    ({"dora": True, "invocation_tokens": [1]}, "dora = True and invocation_tokens"),
    ({"lora_bias": True, "init": "pissa"}, "lora_bias = True and init = 'pissa'"),
    ({"targets": r".*q", "layers": [1]}, "targets = '.*q' and layers"),
    ({"targets": "all-linear", "layers": 0}, "targets = 'all-linear' and layers"),
    ({"targets": ["q"], "layers_pattern": "h"}, "layers_pattern = .'h',. and layers = None"),
    ({"targets": []}, "something to train"),
]


@pytest.mark.parametrize("settings, text", CONFLICTS, ids=str)
def test_settings_that_exclude_each_other(settings, text):
    with pytest.raises(Refused, match=text):
        LoraConfig(**settings)
    stored = LoraConfig().to_peft() | {
        {ours: theirs for theirs, ours in OUR_NAMES.items()}.get(name, name): value
        for name, value in settings.items()
    }
    with pytest.raises(Refused, match="adapter_config.json: "):
        LoraConfig.from_peft(stored, "adapter_config.json")


@pytest.mark.parametrize("name, ours", OUR_NAMES.items())
def test_pefts_names_are_refused_with_ours(name, ours):
    with pytest.raises(Refused) as caught:
        LoraConfig(**{name: 1})
    assert str(caught.value) == (
        f"LoraConfig: PEFT's setting {name}\n  expected: {ours}\n  hint: write {ours} for {name}"
    )


def test_all_unknown_names_at_once():
    with pytest.raises(MultipleErrors) as caught:
        LoraConfig(8, r=4, rnk=4, fan_in_fan_out=True, eva_config={}, dropot=0.1)
    text = str(caught.value)
    for words in ("write rank for r", "'rank'", "layer's class", "write init_options", "'dropout'"):
        assert words in text
    assert len(caught.value.errors) == 5
    with pytest.raises(Refused, match="did you mean 'rank'"):
        dataclasses.replace(LoraConfig(), rnk=3)


def test_a_config_of_older_versions_of_peft():
    config = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 16,
        "target_modules": ["q"],
        "bias": "none",
    }
    config |= {"layers_pattern": "", "layers_to_transform": [], "fan_in_fan_out": True}
    config |= {"init_lora_weights": None, "task_type": "", "modules_to_save": None}
    assert LoraConfig.from_peft(config, "x") == LoraConfig(4, 16, ["q"])
    config |= {"init_lora_weights": "true", "alora_invocation_tokens": [1, 2]}
    expected = LoraConfig(4, 16, ["q"], invocation_tokens=[1, 2])
    assert LoraConfig.from_peft(config, "x") == expected


def test_a_config_that_means_other_arithmetic_is_refused():
    stored = LoraConfig(targets=["q"]).to_peft()
    changes = {"arrow_config": {"top_k": 2}, "use_qalora": True, "r": 0, "lora_dropout": "x"}
    with pytest.raises(MultipleErrors) as caught:
        LoraConfig.from_peft(stored | changes | {"new_flag": 3}, "a/adapter_config.json")
    text = str(caught.value)
    for words in ("arrow_config is set", "use_qalora is set", "r = 0", "lora_dropout = 'x'"):
        assert f"a/adapter_config.json: {words}" in text
    assert "unknown setting new_flag = 3" in text and len(caught.value.errors) == 5
    with pytest.raises(Refused, match="peft_type 'LOHA'"):
        LoraConfig.from_peft(stored | {"peft_type": "LOHA"}, "x")


@pytest.mark.parametrize("init, stored", [
    ("default", True), (False, False), ("gaussian", "gaussian"), ("PiSSA", "pissa"),
    ("pissa_niter_16", "pissa_niter_16"), ("loftq", True), ("olora", "olora"),
])  # fmt: skip
def test_inits_by_the_names_of_the_file(init, stored):
    """LoftQ's quantized base exists when the file is read: PEFT must not quantize once more."""
    assert LoraConfig(init=init).to_peft()["init_lora_weights"] == stored


def test_no_torch_for_a_config():
    code = "import sys; from adapterkit import LoraConfig; LoraConfig(targets=['q']).to_peft(); "
    code += "assert not {'torch', 'regex', 'peft'} & set(sys.modules)"
    root = Path(adapterkit.__file__).parent.parent
    env = os.environ | {"PYTHONPATH": str(root)}
    subprocess.run([sys.executable, "-c", code], check=True, env=env, timeout=240)

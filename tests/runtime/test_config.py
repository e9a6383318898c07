"""LoraConfig: values, refusals, adapter_config.json."""

import copy
import dataclasses
import pickle

import pytest

from adapterkit import LoraConfig
from adapterkit.adapters.lora_config import PEFT_DEFAULTS

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


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_a_config_comes_back_from_its_file(config):
    stored = config.to_peft("org/base")
    assert set(stored) == set(PEFT_DEFAULTS) and stored["base_model_name_or_path"] == "org/base"
    assert LoraConfig.from_peft(stored, "adapter_config.json") == config


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_a_config_is_a_value(config):
    for other in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config)):
        assert other == config
    assert dataclasses.replace(config) == config
    assert dataclasses.replace(config, rank=77) != config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.rank = 3

"""Names and arguments that scripts rely on; what is added must not change them."""

import inspect
from collections.abc import Callable

import pytest

from adapterkit import LoraConfig, runtime
from adapterkit.runtime import Adapters

pytestmark = pytest.mark.quick

REQUIRED = inspect.Parameter.empty
# positional arguments, then keyword ones with their defaults
FUNCTIONS: dict[str, tuple[list[str], dict[str, object]]] = {
    "attach": (["model", "config"], {"name": "default", "seed": None, "stats": None}),
    "load": (["model", "source"], {"name": "default", "trainable": False, "pad_rank": None}),
    "load_arrow": (["model", "folder"], {"name": "arrow", "top_k": None, "temperature": None}),
    "create_arrow_model": (
        ["model", "sources"],
        {"general": (), "top_k": 3, "temperature": 1.0, "compat": None, "seed": None,
         "name": "arrow"},
    ),
    "loraplus": (
        ["h", "optimizer_class"],
        {"lr": REQUIRED, "ratio": REQUIRED, "embedding_lr": 1e-6, "weight_decay": 0.0},
    ),
    "LoraFA": (
        ["h"],
        {"lr": REQUIRED, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.0, "names": None},
    ),
    "Riemannian": (["h", "optimizer_class"], {"lr": REQUIRED, "reg": 1e-2}),
    "prepare_for_kbit_training": (["model"], {}),
    "collect": (
        ["model", "run_model"],
        {"what": "covariance", "targets": None, "compat": None, "mask": None, "out": None},
    ),
}  # fmt: skip
METHODS: dict[str, tuple[list[str], dict[str, object]]] = {
    "attach": (["config"], {"name": REQUIRED, "seed": None, "stats": None}),
    "load": (["source"], {"name": REQUIRED, "trainable": False}),
    "parameters": (["name"], {}),
    "activate": (["names"], {}),
    "disabled": ([], {}),
    "rows": (["names"], {}),
    "merge": (["names"], {}),
    "unmerge": ([], {}),
    "combine": (["adapters"], {"name": REQUIRED, "method": "linear"}),
    "delete": (["name"], {}),
    "detach": ([], {}),
    "save": (["folder"], {"name": None}),
    "rescale": (["factor"], {"name": REQUIRED}),
    "report": ([], {}),
    "swap": (["name", "source"], {}),
    "store": (["folder"], {"max_loaded": REQUIRED}),
    "trainer": (["cls"], {}),
    "add_expert": (["source"], {"name": REQUIRED, "arrow": "arrow"}),
    "remove_expert": (["name"], {"arrow": "arrow"}),
}
SETTINGS = {
    "rank": 8, "alpha": 8, "targets": None, "rslora": False, "dora": False, "dropout": 0.0,
    "bias": "none", "lora_bias": False, "init": "default", "init_options": {},
    "rank_pattern": {}, "alpha_pattern": {}, "exclude": None, "layers": None,
    "layers_pattern": None, "parameters": None,
    "modules_to_save": None, "trainable_tokens": None, "tie": False, "layer_replication": None,
    "invocation_tokens": None, "task_type": None,
}  # fmt: skip


def check(function: Callable, positional: list[str], keywords: dict[str, object]) -> None:
    parameters = inspect.signature(function).parameters
    names = [name for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert names == positional
    for name, default in keywords.items():
        parameter = parameters[name]
        assert parameter.kind is parameter.KEYWORD_ONLY and parameter.default == default, name
    variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    for name in parameters.keys() - {*positional, *keywords}:  # added ones may be left out
        parameter = parameters[name]
        assert parameter.kind in variable or parameter.default is not REQUIRED, name


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_have_the_documented_signatures(name: str):
    check(getattr(runtime, name), *FUNCTIONS[name])


@pytest.mark.parametrize("name", METHODS)
def test_methods_have_the_documented_signatures(name: str):
    positional, keywords = METHODS[name]
    check(getattr(Adapters, name), ["self", *positional], keywords)


@pytest.mark.parametrize("name", ["names", "active", "merged"])
def test_names_active_and_merged_are_properties(name: str):
    assert isinstance(getattr(Adapters, name), property)


def test_the_config_has_the_documented_defaults():
    parameters = inspect.signature(LoraConfig).parameters
    config = LoraConfig()
    assert {name: getattr(config, name) for name in SETTINGS} == SETTINGS
    assert LoraConfig(4, 2, ["q_proj"]).targets == ("q_proj",)
    assert not {"rslora", "dora"} & {
        n for n, p in parameters.items() if p.kind is not p.KEYWORD_ONLY
    }

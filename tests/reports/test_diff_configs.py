"""diff of models' configs: which settings are differences and which are told."""

import json
import math

import pytest
from safetensors.torch import save_file

from adapterkit import diff
from adapterkit.verbs.look.tables import diff_table
from tests.support.differences import normal

pytestmark = pytest.mark.usefixtures("one_thread")


LLAMA = {"model_type": "llama", "hidden_size": 8, "num_attention_heads": 2, "rms_norm_eps": 1e-5}
UNKNOWN = {"model_type": "none-of-theirs", "hidden_size": 8}


@pytest.fixture
def models(tmp_path):
    """diff of two models with the same tensor and these configs; None: without."""

    def compare(a, b, **options):
        for name, config in (("a", a), ("b", b)):
            (tmp_path / name).mkdir(exist_ok=True)
            save_file({"w": normal(4, 4)}, tmp_path / name / "model.safetensors")
            (tmp_path / name / "config.json").unlink(missing_ok=True)
            if config is not None:
                (tmp_path / name / "config.json").write_text(json.dumps(config))
        return diff(tmp_path / "a", tmp_path / "b", **options)

    return compare


def test_a_setting_that_changes_the_arithmetic_is_a_difference_whatever_the_tolerance(models):
    sub = {"text_config": {"rope_theta": 10000.0, "head_dim": 4}}
    for config in (LLAMA, UNKNOWN):
        document = models(
            config | sub,
            config | {"text_config": {"rope_theta": 500000, "head_dim": 4}},
            tolerance=1e9,
        )
        row = {
            "name": "text_config.rope_theta",
            "change": "changed",
            "a": 10000.0,
            "b": 500000,
            "decides": True,
        }
        assert (
            document["config"] == [row]
            and document["totals"]["identical"] == 1
            and not document["same"]
        )
        assert diff_table(document) == ["text_config.rope_theta: 10000.0 -> 500000"]
    assert models(LLAMA | {"rms_norm_eps": 1}, LLAMA | {"rms_norm_eps": 1.0})["config"] == []


def test_settings_that_change_no_arithmetic_are_listed_or_omitted(models):
    one = {
        "transformers_version": "4.40",
        "_name_or_path": "org/one",
        "use_cache": True,
        "torch_dtype": "float32",
    }
    other = {
        "transformers_version": "5.1",
        "use_cache": False,
        "dtype": "bfloat16",
        "attention_dropout": 0.1,
    }
    document = models(LLAMA | one, LLAMA | other)
    rows = [(row["name"], row["change"], row["decides"]) for row in document["config"]]
    assert rows == [
        ("torch_dtype", "removed", False),
        ("dtype", "added", False),
        ("attention_dropout", "added", False),
    ]
    assert document["same"] and "dtype: not set -> 'bfloat16'  (does not count)" in diff_table(
        document
    )


def test_settings_missing_in_a_config_are_the_model_s_defaults(models):
    """Configs of several ages of transformers: added keys, other names for rope."""
    old = LLAMA | {"rope_theta": 500000.0}
    new = LLAMA | {
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "attention_bias": False,
        "head_dim": 4,
    }
    document = models(old, new)
    assert (
        document["same"]
        and document["config"] == []
        and "llama's defaults in transformers" in document["notes"][0]
    )
    document = models(LLAMA, new)
    (row,) = document["config"]
    assert (
        row["name"] == "rope_parameters.rope_theta"
        and (row["a"], row["b"]) == (10000.0, 500000.0)
        and not document["same"]
    )
    mistral = {"model_type": "mistral"}
    assert not models(mistral, mistral | {"sliding_window": None})["same"]  # 4096, and none
    assert models(mistral, mistral | {"sliding_window": 4096})["same"]


def test_settings_of_a_model_that_transformers_does_not_know_or_refuses_are_compared_as_they_stand(
    models,
):
    refused = LLAMA | {"num_attention_heads": "many"}
    for config in (UNKNOWN, {}, refused, {"model_type": "detr", "backbone": "org/somewhere"}):
        document = models(config, config | {"qk_norm": False})
        assert document["config"] == [
            {"name": "qk_norm", "change": "added", "a": None, "b": False, "decides": True}
        ]
        assert not document["same"] and document["notes"] == []
        document = models(config | {"window": None}, config)
        assert diff_table(document) == ["window: None -> not set"]
    other = models({"model_type": "llama"}, {"model_type": "mistral", "sliding_window": 8})
    assert [row["name"] for row in other["config"]] == ["model_type", "sliding_window"]


def test_settings_that_json_or_a_terminal_cannot_hold(models):
    odd = {"model_type": "none", "limits": [0.0, math.inf], "nan": math.nan}
    assert models(odd, odd)["same"]
    document = models(odd, odd | {"limits": [0.0, 1.0], "\u202ename": "\x1b[2J"})
    json.dumps(document, allow_nan=False)
    assert {row["name"]: row["a"] for row in document["config"]} == {
        "limits": [0.0, None],
        "\\u202ename": None,
    }
    for text in (*diff_table(document), json.dumps(document, ensure_ascii=False)):
        assert text.isprintable()


def test_a_side_without_a_config_is_noted(models):
    document = models(LLAMA, None)
    assert (
        document["same"]
        and document["config"] == []
        and document["notes"] == ["b has no config.json: settings are not compared"]
    )
    assert models(None, None)["notes"] == []

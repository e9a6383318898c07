"""Did you mean: refusals of unknown names offer the known one that is closest."""

import pytest

from adapterkit import Refused, registry
from adapterkit.errors import did_you_mean
from adapterkit.options import choice
from adapterkit.patterns import similar_names

MODULES = [
    f"model.layers.{layer}.{name}"
    for layer in range(2)
    for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj", "mlp.gate_proj")
]


def test_the_closest_name_of_each():
    assert did_you_mean(["tyes"], ["linear", "ties"]) == "did you mean 'ties'?"
    assert did_you_mean(["tyes", "liner"], ["linear", "ties"]) == (
        "did you mean 'ties' and 'linear'?"
    )
    assert did_you_mean(["svm"], ["linear", "ties"]) == did_you_mean([], ["a"]) == ""
    assert did_you_mean(["a\x1bb"], ["a\x1bc"]) == r"did you mean 'a\\x1bc'?"


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("q_prj", "did you mean 'q_proj'?"),
        ("self_atn.q_proj", "did you mean 'self_attn'?"),
        ("down_poj|gate_prj", "did you mean 'down_proj' and 'gate_proj'?"),
        (r"layrs\.\d+\.", "did you mean 'layers'?"),
        (r"\bq_proj\b", ""),
        (r"layers[.]7[.]", ""),
        ("conv", ""),
    ],
)
def test_words_of_a_pattern_that_no_module_has(pattern: str, hint: str):
    assert similar_names(pattern, MODULES) == hint


def test_methods_and_their_options():
    with pytest.raises(Refused, match="hint: did you mean 'ties'"):
        registry.create("combinations", "tyes", {})
    with pytest.raises(Refused, match="hint: did you mean 'density'"):
        registry.create("combinations", "ties", {"densty": 0.5})
    with pytest.raises(Refused, match="hint: remove what the method does not take"):
        registry.create("combinations", "linear", {"temperature": 0.5})


def test_choices_of_options():
    with pytest.raises(Refused, match="--tied 'unty'.*\n.*\n.*did you mean 'untie'"):
        choice(("untie", "fold"))("tied", "unty")
    with pytest.raises(Refused, match="hint: use one of these"):
        choice(("untie", "fold"))("tied", 3)

"""Did you mean: refusals of unknown names offer the known one that is closest."""

import pytest

import adapterkit
from adapterkit import Refused
from adapterkit.core import registry
from adapterkit.core.errors import did_you_mean
from adapterkit.core.options import checked, choice
from adapterkit.core.patterns import similar_names

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
    with pytest.raises(Refused, match="--set temperature is unknown\\n.*\\n.*hint: remove it"):
        registry.create("combinations", "linear", {"temperature": 0.5})


def test_choices_of_options():
    with pytest.raises(Refused, match="--tied 'unty'.*\n.*\n.*did you mean 'untie'"):
        checked("tied", choice(("untie", "fold")), "unty")
    with pytest.raises(Refused, match="hint: use one of these"):
        checked("tied", choice(("untie", "fold")), 3)


TYPED = {
    "merge-include": (
        lambda base, lora, out: adapterkit.merge(base, lora, out=out, include="q_prj"),
        "'q_proj'",
    ),
    "extract-include": (
        lambda base, lora, out: adapterkit.extract(base, base, rank=1, out=out, include="q_prj"),
        "'q_proj'",
    ),
    "quantize-to": (lambda base, lora, out: adapterkit.quantize(base, to="fp5", out=out), "'fp8'"),
    "quantize-skip": (
        lambda base, lora, out: adapterkit.quantize(base, to="fp8", out=out, skip=r"layrs\.0\."),
        "'layers'",
    ),
    "init-method": (
        lambda base, lora, out: adapterkit.init(base, method="pisa", rank=1, out=out),
        "'pissa'",
    ),
    "init-targets": (
        lambda base, lora, out: adapterkit.init(
            base, method="pissa", rank=1, targets="q_proj,v_prj", out=out
        ),
        "'v_proj'",
    ),
    "init-targets-regex": (
        lambda base, lora, out: adapterkit.init(
            base, method="pissa", rank=1, targets=".*(gate|dwn)_prj", out=out
        ),
        "did you mean",
    ),
    "loftq-bits-for": (
        lambda base, lora, out: adapterkit.loftq(base, rank=1, bits_for=["dwn_proj=8"], out=out),
        "'down_proj'",
    ),
    "combine-method": (
        lambda base, lora, out: adapterkit.combine([lora], method="tyes_svd", out=out),
        "'ties_svd'",
    ),
    "combine-set": (
        lambda base, lora, out: adapterkit.combine(
            [lora], method="slerp", settings={"tt": 0.5}, out=out
        ),
        "'t'",
    ),
    "combine-weight-for": (
        lambda base, lora, out: adapterkit.combine(
            [lora, lora], method="linear", weight_for=["q_prj=2"], out=out
        ),
        "'q_proj'",
    ),
}


@pytest.mark.parametrize("name", TYPED)
def test_a_mistyped_name_in_python_gets_a_suggestion(name, llama, lora, tmp_path):
    call, suggestion = TYPED[name]
    with pytest.raises(Refused) as error:
        call(llama, lora, tmp_path / "out")
    hint = str(error.value).rpartition("hint: ")[2]
    assert hint.startswith("did you mean ") and suggestion in hint


def test_an_existing_but_unusable_module_gets_no_suggestion(llama, tmp_path):
    with pytest.raises(Refused, match="is a LlamaRMSNorm"):
        adapterkit.init(llama, method="pissa", rank=1, targets="norm", out=tmp_path / "out")

"""--include and --exclude name modules as PEFT's target_modules does: ends of names, or a regular
expression for whole names."""

from types import SimpleNamespace

import pytest
from peft.tuners.tuners_utils import check_target_module_exists

import adapterkit
from adapterkit.core.adapter.record import Adapter, Lora
from adapterkit.core.adapter.selection import Selection, ends_of, text_of_entries
from adapterkit.core.adapter.targets import TargetMatcher, entries_in
from adapterkit.core.checkpoint.folder import LocalFolder
from adapterkit.core.checkpoint.header import TensorSpec
from adapterkit.core.errors import AdapterkitError
from tests.support import oracle
from tests.support.oracle import load

NAMES = [
    f"model.layers.{layer}.{module}"
    for layer in (0, 1, 10)
    for module in ("self_attn.q_proj", "self_attn.xq_proj", "mlp.down_proj", "input_layernorm")
] + ["lm_head", "model.norm"]
TEXTS = [
    "q_proj", "norm", "self_attn.q_proj, lm_head", "0.mlp.down_proj", "layers", "model.norm",
    ".*self_attn.*", r".*layers\.1\..*", "q_proj$", "^model", "q_proj|down_proj", ".*(q|down)_proj",
]  # fmt: skip


def in_peft(name: str, text: str) -> bool:
    """PEFT's target_modules with the list or the regular expression of a text."""
    entries = entries_in(text)
    targets = entries if isinstance(entries, str) else list(entries)
    config = SimpleNamespace(
        target_modules=targets, exclude_modules=None, layers_to_transform=None, layers_pattern=None
    )
    return bool(check_target_module_exists(config, name))


@pytest.mark.parametrize("text", TEXTS)
def test_include_and_exclude_match_the_names_that_pefts_targets_match(text):
    theirs = {name for name in NAMES if in_peft(name, text)}
    assert {name for name in NAMES if Selection(text, None)(name)} == theirs
    assert {name for name in NAMES if not Selection(None, text)(name)} == theirs


@pytest.fixture(scope="module")
def inputs(cached_folder):
    """A Llama, and an adapter on q_proj and down_proj."""
    base = cached_folder("selected-base", lambda out: oracle.save_base(oracle.llama(), out, "fp32"))
    modules = ["q_proj", "down_proj"]
    train = lambda out: oracle.train(load(oracle.llama, base), out, target_modules=modules)
    return base, cached_folder("selected", train)


VERBS = {
    "merge": lambda base, lora, **options: adapterkit.merge(base, lora, **options),
    "extract": lambda base, lora, **options: adapterkit.extract(base, base, rank=1, **options),
    "subtract": lambda base, lora, **options: adapterkit.subtract(
        [lora], general=[lora], **options
    ),
}


@pytest.mark.parametrize("verb", VERBS)
def test_all_entries_that_match_no_module_are_refused_with_the_nearest_names(
    verb, inputs, tmp_path
):
    both = {} if verb == "subtract" else {"include": "self_atn.q_proj"}
    with pytest.raises(AdapterkitError) as caught:
        VERBS[verb](*inputs, out=tmp_path / "out", exclude="q_prj,q_proj,self_attn", **both)
    text = str(caught.value)
    assert "--exclude 'q_prj' matches none" in text and "did you mean 'q_proj'" in text
    assert "--exclude 'self_attn' matches none" in text
    assert 'give ".*self_attn.*" for the modules inside it' in text
    assert ("--include 'self_atn.q_proj' matches none" in text) == bool(both)
    assert "'q_proj' matches none" not in text
    assert {one.code for one in getattr(caught.value, "errors", ())} == {"AK104"}
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("entry", "wider"),
    [
        (r"layers\.0\.", r".*layers\.0\..*"),
        ("^model[.]layers", "model[.]layers.*"),
        ("(q|down)_proj$", ".*((q|down)_proj$).*"),
        ("[qd].*n_proj$", ".*[qd].*n_proj"),
    ],
)
def test_an_expression_for_the_inside_of_a_name_is_refused_with_the_one_for_all_of_it(entry, wider):
    ((refusal),) = TargetMatcher(entry, "--include").refusals(NAMES, "a module")
    assert f'give "{wider}" for the names that contain it' in str(refusal)
    assert not TargetMatcher(wider, "--include").refusals(NAMES)


def test_the_receipt_has_the_names_as_they_were_given(inputs, tmp_path):
    base, lora = inputs
    receipt = adapterkit.merge(
        base, lora, out=tmp_path / "out", include=["q_proj", "mlp.down_proj"]
    )
    assert receipt.data["recipe"]["options"]["include"] == "q_proj,mlp.down_proj"
    assert receipt.data["left_out"] == []


def adapter_with(replaced: list[str], module: str, **config) -> Adapter:
    spec = TensorSpec("x", "F32", (1, 1), "file", 0, 4)
    values = dict.fromkeys(replaced, spec)
    return Adapter(
        LocalFolder("."), 1, config, (Lora(module, "module", spec, spec),), values, (), {}
    )


@pytest.mark.parametrize(
    ("replaced", "module", "saved", "text"),
    [
        (["x.fit.weight", "x.fit.bias"], "x.other", ["fit"], "fit"),
        (["x.fit.weight"], "y.fit", ["x.fit"], "x.fit.weight"),
        (["head.dense.weight", "head.0.bias"], "x.q", ["head"], "dense,head.0"),
        (["x.q.bias", "y.q.bias", "embed.weight"], "x.q", [], "bias,embed.weight"),
        (["x.score_bias", "y.q.bias"], "x.q", [], "bias,x.score_bias"),
        (["x.ö+.weight"], "x.q", ["ö+"], r"(.*[.])?(ö\+)"),
    ],
)
def test_the_ends_of_replaced_parameters_match_them_and_no_adapted_module(
    replaced, module, saved, text
):
    adapter = adapter_with(replaced, module, modules_to_save=saved)
    assert text_of_entries(ends_of(adapter, replaced)) == text
    selects = Selection(None, text)
    assert selects(module)
    assert not any(selects(name, name.rpartition(".")[0]) for name in replaced)

"""The targets of `init`, from headers and the config, against PEFT's on the model itself."""

import functools
import json
import re

import pytest
import transformers
from torch import nn

from adapterkit import LoraConfig
from adapterkit.core.adapter.targets import USUAL_TARGETS
from adapterkit.core.checkpoint.folder import LocalFolder
from adapterkit.core.checkpoint.spec import open_checkpoint
from adapterkit.core.errors import AdapterkitError
from adapterkit.verbs.init.records import Init
from adapterkit.verbs.init.targets import find_targets
from tests.runtime.test_targets import BUILDS, wrapped
from tests.support import oracle, tiny
from tests.support.documents import ROOT
from tests.support.usual import usual

SHRUNK = (
    "bart", "bloom", "codegen", "electra", "falcon", "gemma2", "gpt_neo", "gptj", "mistral", "mpt",
    "phi", "qwen2", "qwen3", "stablelm", "xlm-roberta",
)  # fmt: skip
MODELS = {name: build for name, build in BUILDS.items() if name != "mixed"} | {
    name: functools.partial(tiny.model, name) for name in SHRUNK
}
# all linear layers but the head: as Llama, BERT or GPT-J have them
ALIKE = (
    "blip2", "codegen", "electra", "gpt_neo", "mistral", "mpt", "neox", "opt", "phi", "qwen2",
    "qwen3", "roberta", "stablelm", "xlm-roberta",
)  # fmt: skip
TASKS = {"bert-cls": "SEQ_CLS", "roberta": "SEQ_CLS"}
# PEFT 0.21 loses Mixtral's usual targets, and has its router and experts among all linear layers
OTHERS = {("mixtral", None), ("mixtral", "all-linear")}
ENDS = {
    "llama": "q_proj,mlp.down_proj,lm_head,embed_tokens",
    "gpt2": "c_attn,mlp.c_proj,wte",
    "bert": "query,output.dense",
    "t5": "q,wo,shared",
    "vit": "projection,q_proj,classifier",
    "whisper": "q_proj,fc1,proj_out",
    "neox": "dense,query_key_value",
    "opt": "fc1,project_in",
    "mixtral": "q_proj,v_proj",
    "falcon": "dense,query_key_value",
    "bart": "q_proj,fc2",
}


@functools.cache
def built(name: str) -> nn.Module:
    with oracle.quiet():
        return MODELS[name]()


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """The checkpoint of a model."""
    root = tmp_path_factory.mktemp("targets")

    @functools.cache
    def stored(name: str):
        with oracle.quiet():
            built(name).save_pretrained(root / name)
        return open_checkpoint(LocalFolder(root / name))

    return stored


def found(base, targets, **options):
    given = Init(base=".", out="out", method="default", **{"rank": 4, "targets": targets} | options)
    return find_targets(base, given, [])


def ours(base, targets, **options):
    targets = found(base, targets, **{"alpha": 6} | options)
    return sorted((target.name, target.rank, target.scale) for target in targets)


def theirs(name, **config):
    settings = {"rank": 4, "alpha": 6, "task_type": TASKS.get(name)} | config
    return sorted(wrapped(built(name), LoraConfig(**settings)))


@pytest.mark.parametrize("name", usual(MODELS, lambda name: name not in ALIKE))
def test_all_linear_is_that_of_peft(name, stored):
    if (name, "all-linear") not in OTHERS:
        assert ours(stored(name), "all-linear") == theirs(name, targets="all-linear")


@pytest.mark.parametrize("name", MODELS)
def test_usual_targets_are_those_of_peft(name, stored):
    base = stored(name)
    if base.config["model_type"] not in USUAL_TARGETS:
        with pytest.raises(AdapterkitError, match="no usual targets of model type"):
            ours(base, None)
    elif (name, None) not in OTHERS:
        assert ours(base, None) == theirs(name)


def test_usual_targets_of_mixtral(stored):
    names = [name for name, _, _ in ours(stored("mixtral"), None)]
    assert len(names) == 4 and all(name.endswith(("q_proj", "v_proj")) for name in names)


@pytest.mark.parametrize("name", ENDS)
def test_ends_of_names_are_those_of_peft(name, stored):
    expected = theirs(name, targets=ENDS[name].split(","))
    assert ours(stored(name), ENDS[name]) == expected and expected


def test_a_layer_that_is_asked_for_its_stride_is_refused(stored):
    """Whisper's code asks its convolutions, and PEFT's wrapper has no stride."""
    with pytest.raises(AdapterkitError, match=r"conv1 is passed by in PEFT"):
        ours(stored("whisper"), "conv1")


def test_a_regex_is_for_whole_names(stored):
    for text in (r".*layers\.[02]\..*(q|up)_proj", r"^model\.layers\.[02]\..*(q|up)_proj$"):
        assert ours(stored("llama"), text) == theirs("llama", targets=text)


@pytest.mark.parametrize("text", ["q_proj|up_proj", r"layers\.1\."])
def test_targets_that_only_a_part_of_a_name_matches_are_refused(text, stored):
    with pytest.raises(AdapterkitError, match="matches none|no module is a target"):
        ours(stored("llama"), text)


@pytest.mark.parametrize("text", [".*mlp.*", "up_proj|.*0.mlp.down_proj", "model.*_proj|head"])
def test_an_excluded_regex_is_for_whole_names_as_in_peft(text, stored):
    expected = theirs("llama", targets=".*_proj|lm_head", exclude=text)
    assert ours(stored("llama"), ".*_proj|lm_head", exclude=text) == expected


RULES = [
    ["q_proj=2", "q_proj=3"],
    [r"layers\.0\.self_attn\.v_proj=3", "v_proj=5", ".*q_proj.*=2"],
    [r".*layers\.1.*=2", "v_proj=3"],
]


@pytest.mark.parametrize("rules", RULES)
def test_the_first_matching_rule_counts_as_in_peft(rules, stored):
    patterns: dict[str, int] = {}
    for pattern, rank in (rule.split("=") for rule in rules):
        patterns.setdefault(pattern, int(rank))
    expected = theirs("llama", targets=["q_proj", "v_proj"], rank_pattern=patterns)
    assert ours(stored("llama"), "q_proj,v_proj", rank_for=rules) == expected


@pytest.mark.parametrize(("layers", "expected"), [("1", {1}), ("0-1", {0, 1}), ("0,2", {0, 2})])
def test_layers_narrow_every_kind_of_targets(layers, expected, stored):
    for targets in ("all-linear", ".*_proj", "q_proj,model.layers.1.self_attn.k_proj"):
        names = [target.name for target in found(stored("llama"), targets, layers=layers)]
        assert {int(name.split(".")[2]) for name in names} == expected


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_experts_are_parameters(name, stored):
    expected = theirs(name, targets=["q_proj"], parameters=["gate_up_proj", "experts.down_proj"])
    assert ours(stored(name), "q_proj,gate_up_proj,experts.down_proj") == expected


def test_the_guides_ranks_of_experts_are_those_of_peft(stored):
    """The table of docs/init.md, with its `--rank` and `--rank-for` for 8 experts."""
    section = (ROOT / "docs" / "init.md").read_text("utf-8").split("### Ranks of experts")[1]
    rows = [re.findall(r"`([^`]+)`", line) for line in section.splitlines() if line[:3] == "| `"]
    (_, targets), (_, rank), (_, *rules) = rows[:3]
    patterns = {rule.split("=")[0]: int(rule.split("=")[1]) for rule in rules}
    assert targets.endswith(",".join(patterns)) and {*patterns.values()} == {int(rank) // 8}
    actual = ours(stored("mixtral"), targets, rank=int(rank), alpha=None, rank_for=rules)
    assert {scale for *_, scale in actual} == {1}
    assert actual == theirs(
        "mixtral", rank=int(rank), alpha=int(rank), targets=["q_proj", "v_proj"],
        parameters=[*patterns], rank_pattern=patterns, alpha_pattern=patterns,
    )  # fmt: skip


def test_ranks_and_scales_are_those_of_peft(stored):
    rules = {
        "rank_for": ["v_proj=2", r".*layers\.1.*q_proj=3"],
        "alpha_for": ["layers.0.self_attn.q_proj=5"],
    }
    patterns = {
        "rank_pattern": {"v_proj": 2, r".*layers\.1.*q_proj": 3},
        "alpha_pattern": {"layers.0.self_attn.q_proj": 5},
    }
    expected = theirs("llama", targets=["q_proj", "v_proj"], rslora=True, **patterns)
    assert ours(stored("llama"), "q_proj,v_proj", rslora=True, **rules) == expected


def test_the_table_of_models_covers_most_types():
    types = {json.loads(built(name).config.to_json_string())["model_type"] for name in MODELS}
    assert len(types) >= 25 and transformers.__version__ >= "5"
    assert len(types & USUAL_TARGETS.keys()) >= 18

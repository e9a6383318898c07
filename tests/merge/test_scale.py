"""The scale of each module: alpha / r, rsLoRA's alpha / sqrt(r), and both patterns by PEFT's own
matching rule."""

import json
import math
import re

import peft
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from adapterkit.core.adapter.peft import read_adapter
from adapterkit.core.checkpoint.folder import LocalFolder
from adapterkit.core.errors import Refused
from tests.support import oracle
from tests.support.oracle import (
    LINEAR,
    assert_all_rounded,
    assert_same,
    exact,
    load,
    merged,
    peft_merged,
    peft_model,
)
from tests.support.usual import usual

SCALES = {
    "alpha-over-r": {"r": 4, "lora_alpha": 6},
    "rslora": {"r": 5, "lora_alpha": 6, "use_rslora": True},
    "alpha-1": {"r": 8, "lora_alpha": 1},
    "alpha-0": {
        "r": 4,
        "lora_alpha": 0,
        "alpha_pattern": {"q_proj": 3},
    },  # others get scale 0: they stay
    "negative": {"r": 4, "lora_alpha": -3},
    "float-alpha": {"r": 4, "lora_alpha": 6, "alpha_pattern": {"q_proj": 2.5, "v_proj": 1e-1}},
    "rank-pattern": {
        "rank_pattern": {"q_proj": 2, "down_proj": 7}
    },  # changes the scale too: alpha stays
    "both-patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3, "k_proj": 5}},
    "rslora-patterns": {
        "use_rslora": True,
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"k_proj": 5},
    },
    # of two patterns that match, the first counts
    "first-wins": {
        "alpha_pattern": {
            "layers.0.self_attn.q_proj": 2,
            "q_proj": 9,
            "layers.1.self_attn.q_proj": 5,
        }
    },
    "first-wins-turned": {"alpha_pattern": {"q_proj": 9, "layers.0.self_attn.q_proj": 2}},
    "regex": {
        "rank_pattern": {r"layers\.[01]\.mlp\.(up|gate)_proj": 3},
        "alpha_pattern": {r".*\.0\..*": 1, r"self_attn\..*": 5},
    },
    "anchored": {"alpha_pattern": {"^model.layers.0.mlp.up_proj": 2, "^up_proj": 100}},
    "full-name": {"alpha_pattern": {"model.layers.1.mlp.up_proj": 2}},
    "dot-is-any": {"alpha_pattern": {"self.attn.q.proj": 2}},
    "no-part-of-a-name": {"alpha_pattern": {"proj": 100, "q_pro": 100, "elf_attn.q_proj": 100}},
}


AS_USUAL = ("alpha-over-r", "alpha-1", "negative", "no-part-of-a-name")


# `test_rank_and_scale_follow_the_config` has all ways in which patterns match
MORE_PATTERNS = (
    "alpha-1", "float-alpha", "both-patterns", "first-wins-turned", "anchored", "full-name",
    "dot-is-any",
)  # fmt: skip


@pytest.mark.parametrize("name", usual(SCALES, lambda name: name not in MORE_PATTERNS))
def test_scales_of_patterns_and_rslora_equal_peft(name, llama, cached_folder, tmp_path):
    config = {"target_modules": LINEAR, "size": 0.05, **SCALES[name]}
    oracle.train(load(oracle.llama, llama), tmp_path / "adapter", **config)
    oracle.merge(llama, tmp_path / "adapter", out=tmp_path / "out")
    wrapped, before = (
        peft_model(load(oracle.llama, llama), tmp_path / "adapter"),
        load(oracle.llama, llama).state_dict(),
    )
    scales = {
        m.scaling["a0"] for m in wrapped.modules() if isinstance(getattr(m, "scaling", None), dict)
    }
    alone = config.get("lora_alpha", 6) / config.get("r", 4)
    assert (scales == {alone}) == (name in AS_USUAL), "the case must tell its scale from alpha / r"
    expected = exact(wrapped)
    if name == "alpha-0":
        expected = {k: v for k, v in expected.items() if "q_proj" in k}
    assert_all_rounded(merged(tmp_path / "out", oracle.llama), expected, before)
    oracle.merge(llama, tmp_path / "adapter", out=tmp_path / "peft", compat="peft")
    assert_same(
        merged(tmp_path / "peft", oracle.llama),
        peft_merged(load(oracle.llama, llama), tmp_path / "adapter"),
    )


NAMES = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.11.mlp.up_proj",
    "q_proj",
    "model.q_projx",
    "h.0.attn.c_attn",
]
PIECES = [
    "q_proj",
    "layers",
    ".",
    r"\.",
    "0",
    "1",
    r"\d+",
    ".*",
    "^",
    "$",
    "(",
    ")",
    "|",
    "model",
    "self_attn",
    "_",
    "x",
    "+",
]


@given(
    st.lists(
        st.lists(st.sampled_from(PIECES), min_size=1, max_size=5).map("".join),
        min_size=1,
        max_size=4,
        unique=True,
    )
)
@settings(max_examples=200, deadline=None)
def test_patterns_match_as_in_peft(patterns):
    """`rank_and_scale` against PEFT's get_pattern_key, over random patterns and names."""
    for pattern in patterns:
        try:
            # `)(` is none, though it becomes one inside PEFT's parentheses: that is refused
            re.compile(pattern)
        except re.error:
            return
    table = {pattern: i + 2 for i, pattern in enumerate(patterns)}
    adapter = _adapter({"r": 8, "lora_alpha": 1, "rank_pattern": table, "alpha_pattern": {}})
    for name in NAMES:
        key = get_pattern_key(table.keys(), name)
        assert adapter.rank_and_scale(name) == (table.get(key, 8), 1 / table.get(key, 8)), (
            patterns,
            name,
        )


def _adapter(config: dict):
    from adapterkit.core.adapter.record import Adapter

    return Adapter(LocalFolder("."), 1, config, (), {}, (), {})


@pytest.mark.parametrize(("r", "alpha"), [(1, 1), (3, 7), (8, 16), (64, 16), (7, 0.3)])
@pytest.mark.parametrize("rslora", [False, True])
def test_rank_and_scale_follow_the_config(r, alpha, rslora):
    adapter = _adapter({"r": r, "lora_alpha": alpha, "use_rslora": rslora})
    assert adapter.rank_and_scale("q_proj") == (r, alpha / (math.sqrt(r) if rslora else r))


def test_ranks_of_eva_by_full_names_are_merged(llama, tmp_path):
    """EVA writes float alphas and a rank for each module, under full names."""
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    config = {
        "rank_pattern": {names[0]: 6, names[1]: 2},
        "alpha_pattern": {names[0]: 9.0, names[1]: 3.0},
    }
    oracle.train(load(oracle.llama, llama), tmp_path / "adapter", target_modules=names, **config)
    adapter = oracle.edit_config(
        tmp_path / "adapter", tmp_path / "eva", init_lora_weights="eva", eva_config={"rho": 2.0}
    )
    assert [read_adapter(LocalFolder(adapter)).rank_and_scale(n) for n in names] == [
        (6, 1.5),
        (2, 1.5),
    ]
    oracle.merge(llama, adapter, out=tmp_path / "out")
    expected = exact(peft_model(load(oracle.llama, llama), tmp_path / "adapter"))
    assert_all_rounded(
        merged(tmp_path / "out", oracle.llama), expected, load(oracle.llama, llama).state_dict()
    )


def test_a_rank_that_the_config_does_not_say_is_refused(llama, lora, tmp_path):
    wrong = oracle.edit_config(lora, tmp_path / "wrong", r=8)
    with pytest.raises(Refused) as refusal:
        oracle.merge(llama, wrong, out=tmp_path / "out")
    text = str(refusal.value)
    assert "rank 4 in the file" in text and "rank 8" in text and not (tmp_path / "out").exists()
    assert sum("q_proj" in error.problem for error in refusal.value.errors) == 2


def test_weight_scales_the_delta(llama, lora, tmp_path):
    oracle.merge(llama, f"{lora}=-0.7", out=tmp_path / "out")
    wrapped = peft_model(load(oracle.llama, llama), lora)
    assert_all_rounded(
        merged(tmp_path / "out", oracle.llama),
        exact(wrapped, (-0.7,)),
        load(oracle.llama, llama).state_dict(),
    )


def test_config_of_peft_is_known():
    """Every key that this PEFT writes is read: a new one must be looked at before it is called
    harmless."""
    from adapterkit.core.adapter.config import KNOWN_SETTINGS, OTHER_ARITHMETIC

    config = json.loads(json.dumps(peft.LoraConfig().to_dict(), default=list))
    assert set(config) <= KNOWN_SETTINGS | set(OTHER_ARITHMETIC)

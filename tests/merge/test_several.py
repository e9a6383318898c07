"""Several adapters: weights, one rounding, subtraction, --include and --exclude."""

import json
import re

import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapterkit.core.errors import Refused
from tests.support import oracle
from tests.support.oracle import (
    DTYPES,
    LINEAR,
    assert_all_rounded,
    assert_as_peft,
    assert_rounded,
    assert_same,
    exact,
    load,
    merged,
    peft_merged,
    peft_model,
    stored,
)
from tests.support.usual import usual


@pytest.fixture(scope="session")
def bases(cached_folder):
    """A Llama and three adapters of different ranks and modules, in each dtype."""
    configs = [
        {"target_modules": LINEAR, "r": 4},
        {"target_modules": ["q_proj", "v_proj"], "r": 3, "lora_alpha": 7, "seed": 2},
        {
            "target_modules": ["q_proj", "down_proj", "o_proj"],
            "r": 2,
            "use_rslora": True,
            "seed": 3,
        },
    ]

    def make(dtype):
        base = cached_folder(
            f"several-{dtype}", lambda folder: oracle.save_base(oracle.llama(), folder, dtype)
        )
        train = lambda i: (
            lambda folder: oracle.train(load(oracle.llama, base), folder, **configs[i])
        )
        return base, [cached_folder(f"several-{dtype}-{i}", train(i)) for i in range(3)]

    return make


@pytest.mark.parametrize("dtype", usual(DTYPES, {"bf16", "fp32"}))
@pytest.mark.parametrize(
    "weights", [(1, 1, 1), (0.7, 0.3, 1.0), (-1, 2.5, -0.125), (0, 1, 1)], ids=str
)
def test_sum_is_rounded_once(weights, dtype, bases, tmp_path):
    base, adapters = bases(dtype)
    named = [f"{a}={w}" for a, w in zip(adapters, weights, strict=True)]
    oracle.merge(base, *named, out=tmp_path / "out")
    expected = exact(peft_model(load(oracle.llama, base), *adapters), weights)
    before = load(oracle.llama, base).state_dict()
    if weights[0] == 0:
        expected = {
            n: e for n, e in expected.items() if not torch.equal(e.value, before[n].double())
        }
    assert_all_rounded(merged(tmp_path / "out", oracle.llama), expected, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)], ids=str)
def test_compat_is_pefts_order(order, dtype, bases, tmp_path):
    """PEFT rounds after each adapter, in the order in which they are active."""
    base, adapters = bases(dtype)
    adapters = [adapters[i] for i in order]
    oracle.merge(base, *adapters, out=tmp_path / "out", compat="peft")
    assert_same(
        merged(tmp_path / "out", oracle.llama), peft_merged(load(oracle.llama, base), *adapters)
    )


def test_the_order_of_adapters_does_not_matter(bases, tmp_path):
    """One sum, so the order moves nothing but the last bit of float32 (16 bits: nothing)."""
    base, adapters = bases("bf16")
    for i, order in enumerate([(0, 1, 2), (2, 1, 0), (1, 0, 2)]):
        oracle.merge(base, *(adapters[j] for j in order), out=tmp_path / f"out{i}")
    states = [stored(tmp_path / f"out{i}") for i in range(3)]
    for state in states[1:]:
        assert all(int((state[k] != states[0][k]).sum()) <= 1 for k in state)


def test_peft_rounds_more_often(bases, tmp_path):
    """The default is right where PEFT's several roundings are not (peft.md 0.4)."""
    base, adapters = bases("bf16")
    theirs, name = (
        peft_merged(load(oracle.llama, base), *adapters),
        "model.layers.0.self_attn.q_proj.weight",
    )
    expected = exact(peft_model(load(oracle.llama, base), *adapters))[name]
    with pytest.raises(AssertionError):
        assert_rounded(theirs[name], expected)
    oracle.merge(base, *adapters, out=tmp_path / "out")
    assert_rounded(stored(tmp_path / "out")[name], expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_subtracting_gives_the_base_back(dtype, bases, tmp_path):
    """Added and taken away in two jobs: each element within one rounding of the merged weight, and
    of the result."""
    base, adapters = bases(dtype)
    oracle.merge(base, adapters[0], out=tmp_path / "there")
    oracle.merge(tmp_path / "there", f"{adapters[0]}=-1", out=tmp_path / "back")
    before, there, back = stored(base), stored(tmp_path / "there"), stored(tmp_path / "back")
    half = torch.finfo(DTYPES[dtype]).eps / 2
    for key, weight in before.items():
        w, m, b = weight.double(), there[key].double(), back[key].double()
        limit = half * 1.01 * (m.abs() + b.abs()) * (8 if dtype == "fp32" else 1) + 2.0**-24
        assert bool(((b - w).abs() <= limit).all()), key


def test_added_and_taken_away_in_one_job(bases, tmp_path):
    base, adapters = bases("bf16")
    oracle.merge(base, adapters[0], f"{adapters[0]}=-1", out=tmp_path / "out")
    before, after = stored(base), stored(tmp_path / "out")
    assert all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_embeddings_and_convolutions_of_two_adapters(dtype, cached_folder, tmp_path):
    base = cached_folder(
        f"base-net-{dtype}", lambda folder: oracle.save_base(oracle.net(), folder, dtype)
    )
    targets = ["embed", "line", "image", "point", "volume", "fit"]
    for i in (0, 1):
        oracle.train(
            load(oracle.net, base), tmp_path / f"a{i}", seed=i, r=2 + i, target_modules=targets
        )
    adapters = [tmp_path / "a0", tmp_path / "a1"]
    oracle.merge(base, *adapters, out=tmp_path / "peft", compat="peft")
    assert_as_peft(stored(tmp_path / "peft"), peft_merged(load(oracle.net, base), *adapters))
    oracle.merge(base, adapters[0], f"{adapters[1]}=0.25", out=tmp_path / "out")
    expected = exact(peft_model(load(oracle.net, base), *adapters), (1, 0.25))
    assert_all_rounded(stored(tmp_path / "out"), expected, stored(base))


def test_as_add_weighted_adapter_cat(bases, tmp_path):
    """PEFT's exact combination, `cat`, is the same sum."""
    base, adapters = bases("fp32")
    with oracle.quiet():
        wrapped = peft_model(load(oracle.llama, base), *adapters[:2])
        wrapped.add_weighted_adapter(["a0", "a1"], [0.7, -0.3], "both", combination_type="cat")
        wrapped.base_model.set_adapter("both")
        theirs = wrapped.merge_and_unload().state_dict()
    oracle.merge(base, f"{adapters[0]}=0.7", f"{adapters[1]}=-0.3", out=tmp_path / "out")
    for name, tensor in stored(tmp_path / "out").items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-5, atol=1e-7)


@given(weights=st.lists(st.floats(-4, 4, allow_subnormal=False), min_size=1, max_size=3))
@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_merges_with_any_weights_equal_float64(weights, bases, tmp_path_factory):
    base, adapters = bases("bf16")
    adapters, out = adapters[: len(weights)], tmp_path_factory.mktemp("any") / "out"
    oracle.merge(base, *(f"{a}={w!r}" for a, w in zip(adapters, weights, strict=True)), out=out)
    for name, value in exact(
        peft_model(load(oracle.llama, base), *adapters), tuple(weights)
    ).items():
        assert_rounded(stored(out)[name], value, name)


# -- include and exclude ---------------------------------------------------------------------------

OWN = re.compile(r"\.0\.self_attn\.q_proj$|\.o_proj$")
CHOICES = {
    "include": ({"include": "q_proj"}, lambda n: "q_proj" in n),
    "include-list": ({"include": ["0.self_attn.q_proj", "o_proj"]}, lambda n: OWN.search(n)),
    "include-layer": ({"include": r".*layers\.1\..*"}, lambda n: "layers.1." in n),
    "exclude": ({"exclude": ".*mlp.*"}, lambda n: "mlp" not in n),
    "both": (
        {"include": r".*layers\.0\..*", "exclude": "q_proj, self_attn.k_proj"},
        lambda n: "layers.0." in n and not n.endswith(("q_proj", "k_proj")),
    ),
}


@pytest.mark.parametrize("name", CHOICES)
def test_include_and_exclude(name, bases, tmp_path):
    base, adapters = bases("bf16")
    options, taken = CHOICES[name]
    receipt = oracle.merge(base, *adapters[:2], out=tmp_path / "out", **options)
    expected = exact(peft_model(load(oracle.llama, base), *adapters[:2]))
    chosen = {n: e for n, e in expected.items() if taken(n.removesuffix(".weight"))}
    assert 0 < len(chosen) < len(expected)
    assert_all_rounded(
        merged(tmp_path / "out", oracle.llama), chosen, load(oracle.llama, base).state_dict()
    )
    modules = {
        m for i, a in enumerate(adapters[:2]) for m in [f"{a.name}: {n}" for n in _modules(a)]
    }
    left_out = {m for m in modules if not taken(m.partition(": ")[2])}
    assert set(receipt.data["left_out"]) == left_out
    assert set(json.loads((tmp_path / "out/adapterkit.json").read_text())["left_out"]) == left_out


def _modules(adapter):
    return {k.removeprefix("base_model.model.").partition(".lora_")[0] for k in stored(adapter)}


def test_nothing_left_is_refused(bases, tmp_path):
    base, adapters = bases("bf16")
    with pytest.raises(Refused, match="no module is selected"):
        oracle.merge(base, adapters[0], out=tmp_path / "out", exclude=".*")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("what", ["modules_to_save", "token rows", "dora"])
def test_exclude_leaves_out_what_is_no_delta(what, bases, tmp_path):
    """Then a weight is no contradiction any more."""
    base, _ = bases("bf16")
    config, out, key = {
        "modules_to_save": ({"modules_to_save": ["lm_head"]}, "lm_head", "lm_head.weight"),
        "token rows": (
            {"trainable_token_indices": [3]},
            "embed_tokens",
            "model.embed_tokens.weight",
        ),
        "dora": (
            {"use_dora": True, "target_modules": ["up_proj"]},
            "up_proj",
            "model.layers.0.mlp.up_proj.weight",
        ),
    }[what]
    oracle.train(
        load(oracle.llama, base), tmp_path / "whole", **({"target_modules": ["q_proj"]} | config)
    )
    oracle.train(load(oracle.llama, base), tmp_path / "plain", target_modules=["q_proj"])
    other = [tmp_path / "plain"] if what == "dora" else []
    receipt = oracle.merge(
        base, f"{tmp_path / 'whole'}=0.5", *other, out=tmp_path / "out", exclude=out
    )
    assert torch.equal(stored(tmp_path / "out")[key], stored(base)[key])
    assert any(out in name for name in receipt.data["left_out"])


def test_weights_of_peft_lora_config_are_not_touched(bases):
    """The oracle's adapters keep their files as PEFT wrote them: nothing in a merge writes to its
    inputs."""
    _, adapters = bases("bf16")
    for adapter in adapters:
        assert peft.PeftConfig.from_pretrained(adapter).peft_type == "LORA"
        assert {f.name for f in adapter.iterdir()} == {
            "adapter_config.json",
            "adapter_model.safetensors",
            "README.md",
        }

"""Tied embeddings: one weight in memory and in the file, two names.

PEFT 0.21 adds the delta of one side to the shared matrix, so the other side changes too, and an
adapter made with ensure_weight_tying twice (peft.md 1.17). By default a change of one side makes
them two; --tied fold gives PEFT's result.
"""

import json

import peft
import pytest
import torch

from adapterkit.core.errors import Refused
from tests.support import oracle
from tests.support.oracle import (
    DTYPES,
    assert_rounded,
    assert_same,
    exact,
    load,
    merged,
    peft_merged,
    peft_model,
    read_config,
    stored,
)
from tests.support.usual import usual

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
MODELS = {"llama": oracle.tied_llama, "gemma": oracle.gemma}


@pytest.fixture(scope="session")
def tied(cached_folder):
    """(build, base, adapter) of a tied model; `config`: what the adapter trains."""

    def make(model="llama", dtype="bf16", **config):
        build = MODELS[model]
        base = cached_folder(
            f"tied-{model}-{dtype}", lambda folder: oracle.save_base(build(), folder, dtype)
        )
        assert HEAD not in stored(base) and read_config(base).get("tie_word_embeddings", True)
        name = f"tied-{model}-{dtype}-{sorted(config.items())}".translate(
            str.maketrans("", "", "[](){}' :,/")
        )
        return (
            build,
            base,
            cached_folder(name, lambda folder: oracle.train(load(build, base), folder, **config)),
        )

    return make


@pytest.mark.parametrize("dtype", usual(DTYPES, {"bf16"}))
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("side", ["embed_tokens", "lm_head"])
def test_one_side_unties(side, model, dtype, tied, tmp_path):
    build, base, adapter = tied(model, dtype, target_modules=[side, "q_proj"])
    oracle.merge(base, adapter, out=tmp_path / "out")
    shared, out = stored(base)[EMBEDDING], stored(tmp_path / "out")
    changed, other = (EMBEDDING, HEAD) if side == "embed_tokens" else (HEAD, EMBEDDING)
    expected = exact(peft_model(load(build, base), adapter))
    assert_rounded(out[changed], expected[changed], changed)
    assert not torch.equal(out[changed], shared) and torch.equal(out[other], shared)
    assert read_config(tmp_path / "out")["tie_word_embeddings"] is False
    state = merged(tmp_path / "out", build)
    assert torch.equal(state[HEAD], out[HEAD]) and torch.equal(state[EMBEDDING], out[EMBEDDING])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "targets", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head", "q_proj"]], ids="-".join
)
def test_fold_is_pefts_result(targets, dtype, tied, tmp_path):
    build, base, adapter = tied("llama", dtype, target_modules=targets)
    oracle.merge(base, adapter, out=tmp_path / "out", tied="fold", compat="peft")
    assert_same(merged(tmp_path / "out", build), peft_merged(load(build, base), adapter))
    assert set(stored(tmp_path / "out")) == set(stored(base)) and read_config(
        tmp_path / "out"
    ) == read_config(base)


def test_fold_rounds_both_deltas_once(tied, tmp_path):
    build, base, adapter = tied("llama", "bf16", target_modules=["embed_tokens", "lm_head"])
    oracle.merge(base, adapter, out=tmp_path / "out", tied="fold")
    sides = exact(peft_model(load(build, base), adapter))
    shared = stored(base)[EMBEDDING].double()
    both = oracle.Exact(
        sides[EMBEDDING].value + sides[HEAD].value - shared,
        sides[EMBEDDING].size + sides[HEAD].size,
        sides[EMBEDDING].inputs + sides[HEAD].inputs,
    )
    assert_rounded(stored(tmp_path / "out")[EMBEDDING], both)


@pytest.mark.parametrize("side", ["embed_tokens", "lm_head"])
def test_tied_weights_are_refused_with_tied_refuse(side, tied, tmp_path):
    _, base, adapter = tied(target_modules=[side])
    with pytest.raises(Refused, match=r"is tied to .*\n.*\n.*--tied untie"):
        oracle.merge(base, adapter, out=tmp_path / "out", tied="refuse")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("how", ["untie", "fold", "refuse"])
def test_other_modules_leave_the_tie(how, tied, tmp_path):
    build, base, adapter = tied(target_modules=["q_proj"])
    oracle.merge(base, adapter, out=tmp_path / "out", tied=how, compat="peft")
    assert_same(merged(tmp_path / "out", build), peft_merged(load(build, base), adapter))
    assert set(stored(tmp_path / "out")) == set(stored(base)) and read_config(
        tmp_path / "out"
    ) == read_config(base)


@pytest.mark.parametrize("how", ["untie", "fold", "refuse"])
def test_ensure_weight_tying_applies_once(how, tied, tmp_path):
    """PEFT's merge gives W + 2Δ there (peft.md 1.17); the trained model computes with W + Δ."""
    build, base, adapter = tied(
        "llama", "fp32", target_modules=["embed_tokens"], ensure_weight_tying=True
    )
    keys = [k for k in stored(adapter) if "lora_" in k]
    assert any("lora_embedding_A" in k for k in keys) and any("lm_head.lora_A" in k for k in keys)
    oracle.merge(base, adapter, out=tmp_path / "out", tied=how)
    expected = exact(peft_model(load(build, base), adapter))[EMBEDDING]
    assert_rounded(stored(tmp_path / "out")[EMBEDDING], expected)
    assert (
        set(stored(tmp_path / "out")) == set(stored(base))
        and read_config(tmp_path / "out")["tie_word_embeddings"] is True
    )
    theirs = peft_merged(load(build, base), adapter)[EMBEDDING]
    with pytest.raises(AssertionError):  # PEFT adds it once now: compare with its result
        assert_rounded(theirs, expected)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_ensured_deltas_that_came_apart_are_two(dtype, tied, tmp_path):
    """PEFT's upcast of the factors ends the sharing on 16-bit bases: the sides train apart, and the
    file holds two deltas."""
    build, base, adapter = tied(
        "llama", dtype, target_modules=["embed_tokens"], ensure_weight_tying=True
    )
    oracle.merge(base, adapter, out=tmp_path / "out")
    expected, out = exact(peft_model(load(build, base), adapter)), stored(tmp_path / "out")
    for name in (EMBEDDING, HEAD):
        assert_rounded(out[name], expected[name], name)
    assert (
        not torch.equal(out[EMBEDDING], out[HEAD])
        and read_config(tmp_path / "out")["tie_word_embeddings"] is False
    )
    with pytest.raises(Refused, match="is tied to"):
        oracle.merge(base, adapter, out=tmp_path / "refused", tied="refuse")


def test_ensure_weight_tying_with_modules_to_save(tied, tmp_path):
    build, base, adapter = tied(
        target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True
    )
    oracle.merge(base, adapter, out=tmp_path / "out", compat="peft")
    assert_same(merged(tmp_path / "out", build), peft_merged(load(build, base), adapter))
    assert HEAD not in stored(tmp_path / "out")


@pytest.mark.parametrize(
    "saved", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"]], ids="-".join
)
@pytest.mark.parametrize("how", ["untie", "fold"])
def test_modules_to_save_untie(how, saved, tied, tmp_path):
    """PEFT has two weights then, in memory too."""
    build, base, adapter = tied(target_modules=["q_proj"], modules_to_save=saved)
    oracle.merge(base, adapter, out=tmp_path / "out", tied=how, compat="peft")
    assert read_config(tmp_path / "out")["tie_word_embeddings"] is False
    assert_same(merged(tmp_path / "out", build), peft_merged(load(build, base), adapter))
    assert not torch.equal(stored(tmp_path / "out")[HEAD], stored(tmp_path / "out")[EMBEDDING])


@pytest.mark.parametrize("how", ["untie", "fold", "refuse"])
def test_token_rows_stay_tied(how, tied, tmp_path):
    """PEFT trains one set of rows for both sides."""
    build, base, adapter = tied(target_modules=["q_proj"], trainable_token_indices=[5, 2])
    oracle.merge(base, adapter, out=tmp_path / "out", tied=how, compat="peft")
    theirs = peft_merged(load(build, base), adapter)
    assert torch.equal(theirs[HEAD], theirs[EMBEDDING])
    assert_same(merged(tmp_path / "out", build), theirs)
    assert HEAD not in stored(tmp_path / "out") and read_config(tmp_path / "out") == read_config(
        base
    )


def test_different_rows_of_both_sides(tied, tmp_path):
    """PEFT computes with each side's own rows, and its merge puts all rows into the shared matrix:
    that is --tied fold."""
    indices = {"embed_tokens": [5, 2], "lm_head": [7]}
    build, base, adapter = tied(target_modules=["q_proj"], trainable_token_indices=indices)
    oracle.merge(base, adapter, out=tmp_path / "out")
    before, after = stored(base)[EMBEDDING], stored(tmp_path / "out")
    assert (after[EMBEDDING] != before).any(1).nonzero().flatten().tolist() == [2, 5]
    assert (after[HEAD] != before).any(1).nonzero().flatten().tolist() == [7]
    oracle.merge(base, adapter, out=tmp_path / "fold", tied="fold")
    assert_same(merged(tmp_path / "fold", build), peft_merged(load(build, base), adapter))


@pytest.mark.parametrize(
    "config", [{}, {"trainable_token_indices": [85, 3]}], ids=["embedding", "rows"]
)
@pytest.mark.parametrize("how", ["untie", "fold", "refuse"])
def test_resized_vocabulary_stays_tied(how, config, tied, tmp_path):
    """PEFT saves a resized tied embedding under both names; equal values are one weight, and
    trained rows are both sides'."""
    build, base, _ = tied(target_modules=["q_proj"])
    model = load(build, base)
    with oracle.quiet():
        model.resize_token_embeddings(90, mean_resizing=False)
        wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], **config))
        oracle.perturb(wrapped, 1)
        wrapped.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
        theirs = wrapped.merge_and_unload().state_dict()
    sides = [k for k, v in stored(tmp_path / "adapter").items() if v.shape == (90, 32)]
    assert len(sides) == 2, sides
    oracle.merge(base, tmp_path / "adapter", out=tmp_path / "out", tied=how, compat="peft")
    assert set(stored(tmp_path / "out")) == set(stored(base))
    assert read_config(tmp_path / "out") == read_config(base) | {"vocab_size": 90}
    assert_same(merged(tmp_path / "out", build), theirs)


@pytest.mark.parametrize("how", ["untie", "fold"])
def test_a_base_that_stores_both(how, tied, tmp_path):
    """Some checkpoints hold the tied head as well: the copies stay equal when folded, and are two
    when untied."""
    build, base, adapter = tied(target_modules=["embed_tokens"])
    both = oracle.edit_config(base, tmp_path / "both")
    tensors = stored(base)
    oracle.save_file(
        tensors | {HEAD: tensors[EMBEDDING].clone()},
        both / "model.safetensors",
        metadata={"format": "pt"},
    )
    oracle.merge(both, adapter, out=tmp_path / "out", tied=how)
    after = stored(tmp_path / "out")
    expected = exact(peft_model(load(build, base), adapter))[EMBEDDING]
    assert_rounded(after[EMBEDDING], expected)
    assert torch.equal(after[HEAD], after[EMBEDDING] if how == "fold" else tensors[EMBEDDING])
    state = merged(tmp_path / "out", build)
    assert torch.equal(state[HEAD], after[HEAD]) and torch.equal(state[EMBEDDING], after[EMBEDDING])


def test_ties_of_a_model_that_transformers_does_not_know(tied, tmp_path):
    """Nobody can say then what else the embedding is; the shared weight can be changed on
    request."""
    _, base, adapter = tied(target_modules=["embed_tokens"])
    unknown = oracle.edit_config(
        base, tmp_path / "unknown", model_type="mystery", architectures=["MysteryForCausalLM"]
    )
    with pytest.raises(
        Refused, match=r"model.embed_tokens.weight may have other names(.*\n)*.*--tied fold"
    ):
        oracle.merge(unknown, adapter, out=tmp_path / "out")
    oracle.merge(unknown, adapter, out=tmp_path / "out", tied="fold")
    oracle.merge(base, adapter, out=tmp_path / "fold", tied="fold")
    assert_same(stored(tmp_path / "out"), stored(tmp_path / "fold"))


def test_untied_head_goes_to_the_last_shard(tied, tmp_path):
    build, base, adapter = tied(target_modules=["lm_head"])
    with oracle.quiet():
        load(build, base).save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    oracle.merge(tmp_path / "sharded", adapter, out=tmp_path / "out")
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["weight_map"][HEAD] == max(index["weight_map"].values())
    merged(tmp_path / "out", build)


TRAINED = {
    "embedding": {"target_modules": ["embed_tokens"]},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "both": {"target_modules": ["embed_tokens", "lm_head"]},
    "ensured": {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    "saved-head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "rows": {"target_modules": ["q_proj"], "trainable_token_indices": [5, 2]},
    "rows-of-head": {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [7, 1]}},
    "rows-of-embedding": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": [7, 1]},
    },
    "rows-of-both": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": [7, 1], "lm_head": [3]},
    },
    "same-rows": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": [7, 1], "lm_head": [7, 1]},
    },
}


@pytest.mark.parametrize("name", TRAINED)
def test_logits_are_those_of_the_trained_model(name, tied, tmp_path):
    """The merged model computes what the adapter's model computes before any merge."""
    build, base, adapter = tied("llama", "fp32", **TRAINED[name])
    tokens = torch.arange(16).view(2, 8)
    with torch.inference_mode():
        right = peft_model(load(build, base), adapter)(tokens).logits
        oracle.merge(base, adapter, out=tmp_path / "out")
        actual = load(build, tmp_path / "out")(tokens).logits
        before = load(build, base)(tokens).logits
    torch.testing.assert_close(actual, right, rtol=1e-4, atol=1e-5)
    assert (right - before).abs().max() > 1e-2

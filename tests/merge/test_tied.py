"""Tied embeddings: one weight in memory and in the file, two names.

PEFT 0.21 adds the delta of one side to the shared matrix, so the other side changes too, and an
adapter made with ensure_weight_tying twice (peft.md 1.17). By default a change of one side makes
them two; --tied fold gives PEFT's result.
"""

import json

import peft
import pytest
import torch
import transformers

from adapterkit.errors import Refused
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
    stored,
)

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
MODELS = {"llama": oracle.tied_llama, "gemma": oracle.gemma}


def _config(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.fixture(scope="session")
def tied(cached_folder):
    """(build, base, adapter) of a tied model; `config`: what the adapter trains."""

    def make(model="llama", dtype="bf16", **config):
        build = MODELS[model]
        base = cached_folder(
            f"tied-{model}-{dtype}", lambda folder: oracle.save_base(build(), folder, dtype)
        )
        assert HEAD not in stored(base) and _config(base).get("tie_word_embeddings", True)
        name = f"tied-{model}-{dtype}-{sorted(config.items())}".translate(
            str.maketrans("", "", "[](){}' :,/")
        )
        return (
            build,
            base,
            cached_folder(name, lambda folder: oracle.train(load(build, base), folder, **config)),
        )

    return make


@pytest.mark.parametrize("dtype", DTYPES)
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
    assert _config(tmp_path / "out")["tie_word_embeddings"] is False
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
    assert set(stored(tmp_path / "out")) == set(stored(base)) and _config(
        tmp_path / "out"
    ) == _config(base)


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
def test_refuse(side, tied, tmp_path):
    _, base, adapter = tied(target_modules=[side])
    with pytest.raises(Refused, match=r"is tied to .*\n.*\n.*--tied untie"):
        oracle.merge(base, adapter, out=tmp_path / "out", tied="refuse")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("how", ["untie", "fold", "refuse"])
def test_other_modules_leave_the_tie(how, tied, tmp_path):
    build, base, adapter = tied(target_modules=["q_proj"])
    oracle.merge(base, adapter, out=tmp_path / "out", tied=how, compat="peft")
    assert_same(merged(tmp_path / "out", build), peft_merged(load(build, base), adapter))
    assert set(stored(tmp_path / "out")) == set(stored(base)) and _config(
        tmp_path / "out"
    ) == _config(base)


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
        and _config(tmp_path / "out")["tie_word_embeddings"] is True
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
        and _config(tmp_path / "out")["tie_word_embeddings"] is False
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
    assert _config(tmp_path / "out")["tie_word_embeddings"] is False
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
    assert HEAD not in stored(tmp_path / "out") and _config(tmp_path / "out") == _config(base)


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
    assert _config(tmp_path / "out") == _config(base) | {"vocab_size": 90}
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


def test_shared_embeddings_of_t5(cached_folder, tmp_path):
    """T5 has one matrix under four names; `shared` is the stored one."""
    base = cached_folder("tied-t5", lambda folder: oracle.save_base(oracle.t5(), folder, "bf16"))
    oracle.train(load(oracle.t5, base), tmp_path / "adapter", target_modules=["shared", "q"])
    oracle.merge(base, tmp_path / "adapter", out=tmp_path / "fold", tied="fold", compat="peft")
    assert_same(
        merged(tmp_path / "fold", oracle.t5),
        peft_merged(load(oracle.t5, base), tmp_path / "adapter"),
    )
    # T5's config reads tie_word_embeddings = false as "do not scale the decoder's outputs": untying
    # would change the logits
    with pytest.raises(Refused, match="cannot be untied"):
        oracle.merge(base, tmp_path / "adapter", out=tmp_path / "out")
    oracle.merge(base, tmp_path / "adapter", out=tmp_path / "part", exclude="shared", compat="peft")
    assert torch.equal(stored(tmp_path / "part")["shared.weight"], stored(base)["shared.weight"])


def test_a_switch_that_means_more_is_not_turned(cached_folder, tmp_path):
    """SwitchTransformers scales its outputs by tie_word_embeddings: untied, the logits would be
    others."""
    sizes = {
        "vocab_size": 80,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_heads": 4,
        "num_experts": 2,
    }
    build = lambda: transformers.SwitchTransformersForConditionalGeneration(
        transformers.SwitchTransformersConfig(**sizes)
    )
    base = cached_folder("tied-switch", lambda folder: oracle.save_base(build(), folder, "bf16"))
    oracle.train(load(build, base), tmp_path / "adapter", target_modules=["lm_head", "q"])
    with pytest.raises(
        Refused, match="cannot be untied: this model's code does more by tie_word_embeddings"
    ):
        oracle.merge(base, tmp_path / "adapter", out=tmp_path / "out")
    oracle.merge(base, tmp_path / "adapter", out=tmp_path / "out", exclude="lm_head")
    assert _config(tmp_path / "out") == _config(base)


def test_nested_config_is_untied(tmp_path):
    """tie_word_embeddings of a text_config is set as well."""
    tower = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    config = transformers.Gemma3Config(
        vision_config={**tower, "image_size": 16, "patch_size": 8},
        text_config={
            **tower,
            "vocab_size": 80,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "tie_word_embeddings": True,
        },
        mm_tokens_per_image=4,
    )
    torch.manual_seed(0)
    with oracle.quiet():
        model = transformers.Gemma3ForConditionalGeneration(config).to(torch.bfloat16)
        model.save_pretrained(tmp_path / "base")
        model = transformers.Gemma3ForConditionalGeneration.from_pretrained(
            tmp_path / "base", dtype="auto"
        )
    assert model.lm_head.weight is model.get_input_embeddings().weight
    oracle.train(model, tmp_path / "adapter", target_modules=["lm_head"])
    oracle.merge(tmp_path / "base", tmp_path / "adapter", out=tmp_path / "out")
    text = _config(tmp_path / "out")
    assert (
        text["tie_word_embeddings"] is False
        and text["text_config"].get("tie_word_embeddings", False) is False
    )
    loaded = oracle.load_checked(transformers.Gemma3ForConditionalGeneration, tmp_path / "out")
    before = model.get_input_embeddings().weight
    assert torch.equal(loaded.get_input_embeddings().weight, before)
    assert not torch.equal(loaded.lm_head.weight, before)


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


SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}
TEXT = SIZES | {"vocab_size": 80, "max_position_embeddings": 64}
SEQ2SEQ = {
    "vocab_size": 80,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
}
SEQ2SEQ |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
BLIP = {
    "text_config": TEXT | {"encoder_hidden_size": 32},
    "vision_config": SIZES | {"image_size": 16, "patch_size": 8},
}
QWEN = {
    "text_config": TEXT
    | {"num_key_value_heads": 2, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}},
    "vision_config": {
        "depth": 1,
        "embed_dim": 32,
        "hidden_size": 32,
        "num_heads": 4,
        "mlp_ratio": 2,
    },
    "tie_word_embeddings": True,
}
QWEN["text_config"] |= {"tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2}
GEMMA = SIZES | {"vocab_size": 80, "num_key_value_heads": 2, "head_dim": 8}
T5GEMMA = {
    "encoder": {
        "text_config": GEMMA,
        "vision_config": SIZES | {"image_size": 16, "patch_size": 8},
        "mm_tokens_per_image": 4,
    }
}
T5GEMMA |= {"decoder": GEMMA, "image_token_index": 72, "eoi_token_index": 70}
# class, config, input embedding, head; all but the first of a kind tie more than these two
FAMILIES = {
    "bert-mlm": ("BertForMaskedLM", "BertConfig", TEXT, "word_embeddings", "decoder"),
    "bert-lm": (
        "BertLMHeadModel",
        "BertConfig",
        TEXT | {"is_decoder": True},
        "word_embeddings",
        "decoder",
    ),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", TEXT, "word_embeddings", "decoder"),
    "megatron-bert": (
        "MegatronBertForMaskedLM",
        "MegatronBertConfig",
        TEXT,
        "word_embeddings",
        "decoder",
    ),
    "visual-bert": (
        "VisualBertForPreTraining",
        "VisualBertConfig",
        TEXT,
        "word_embeddings",
        "decoder",
    ),
    "blip": (
        "BlipForConditionalGeneration",
        "BlipConfig",
        BLIP,
        "word_embeddings",
        "predictions.decoder",
    ),
    "electra": (
        "ElectraForMaskedLM",
        "ElectraConfig",
        TEXT | {"embedding_size": 16},
        "word_embeddings",
        "generator_lm_head",
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": 80, "n_embd": 32, "n_layer": 1, "n_head": 4},
        "wte",
        "lm_head",
    ),
    "bart": ("BartForConditionalGeneration", "BartConfig", SEQ2SEQ, "shared", "lm_head"),
    "t5gemma2": (
        "T5Gemma2ForConditionalGeneration",
        "T5Gemma2Config",
        T5GEMMA,
        "text_model.embed_tokens",
        "lm_head.out_proj",
    ),
    "qwen2-vl": (
        "Qwen2VLForConditionalGeneration",
        "Qwen2VLConfig",
        QWEN,
        "embed_tokens",
        "lm_head",
    ),
}
SIDES = {
    "embedding": lambda e, h: {"target_modules": [e, "query"]},
    "head": lambda e, h: {"target_modules": [h, "query"]},
    "both": lambda e, h: {"target_modules": [e, h]},
    "ensured": lambda e, h: {"target_modules": [e], "ensure_weight_tying": True},
    "rows": lambda e, h: {
        "target_modules": ["query", "q_proj", "c_attn"],
        "trainable_token_indices": {e: [5, 2]},
    },
    "rows-and-head": lambda e, h: {"target_modules": [h], "trainable_token_indices": {e: [5, 2]}},
    "rows-apart": lambda e, h: {
        "target_modules": ["query", "q_proj", "c_attn"],
        "trainable_token_indices": {e: [5, 2], h: [7]},
    },
    "saved-head": lambda e, h: {
        "target_modules": ["query", "q_proj", "c_attn"],
        "modules_to_save": [h],
    },
}


@torch.no_grad()
def _family(name, folder):
    """A base whose biases and embeddings are not near zero, so that a lost one shows."""
    cls, config, sizes, *_ = FAMILIES[name]
    torch.manual_seed(0)
    with oracle.quiet():
        model = getattr(transformers, cls)(getattr(transformers, config)(**sizes)).eval()
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        parameter.add_(
            (0.3 if 80 in parameter.shape else 0.05)
            * torch.randn(parameter.shape, generator=generator)
        )
    oracle.save_base(model, folder, "fp32")


@torch.no_grad()
def _logits(model, name):
    model, ids = model.double(), torch.arange(3, 19).view(2, 8)
    pixels = torch.linspace(-1, 1, 1536).view(2, 3, 16, 16).double()
    answer = {"decoder_input_ids": ids.flip(1)}
    given = {"blip": {"pixel_values": pixels}, "bart": answer, "t5gemma2": answer}
    with oracle.quiet():
        actual = model(input_ids=ids, **given.get(name, {}))
    return actual["prediction_logits" if "prediction_logits" in actual else "logits"]


@pytest.mark.parametrize("trained", SIDES)
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_of_every_family(name, trained, cached_folder, tmp_path):
    """transformers' switch releases every tie of a model at once, biases too: each is written
    out."""
    cls, _, _, embedding, head = FAMILIES[name]
    base = cached_folder(f"tied-family-{name}", lambda folder: _family(name, folder))
    oracle.train(load(cls, base), tmp_path / "adapter", **SIDES[trained](embedding, head))
    oracle.merge(base, tmp_path / "adapter", out=tmp_path / "out")
    wrapped, before = (
        peft_model(load(cls, base), tmp_path / "adapter"),
        _logits(load(cls, base), name),
    )
    after = load(cls, tmp_path / "out")
    # there PEFT leaves the head's bias out until it merges
    for model in (wrapped, after) if "rows" in trained else ():
        for parameter in model.parameters():
            if parameter.shape == (80,):
                parameter.data.zero_()
    right, actual = _logits(wrapped, name), _logits(after, name)
    torch.testing.assert_close(actual, right, rtol=1e-5, atol=1e-5)
    # Bart calls its encoder's and decoder's embeddings, never `shared` itself
    assert (right - before).abs().max() > 1e-4 or (embedding, trained) in {
        ("shared", "embedding"),
        ("shared", "ensured"),
    }


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

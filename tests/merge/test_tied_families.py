"""Ties of other model families than Llama, and their logits before and after a merge."""

import itertools

import pytest
import torch
import transformers

from adapterkit.core.errors import Refused
from tests.support import oracle
from tests.support.oracle import (
    assert_same,
    load,
    merged,
    peft_merged,
    peft_model,
    read_config,
    stored,
)
from tests.support.usual import usual


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
    assert read_config(tmp_path / "out") == read_config(base)


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
    text = read_config(tmp_path / "out")
    assert (
        text["tie_word_embeddings"] is False
        and text["text_config"].get("tie_word_embeddings", False) is False
    )
    loaded = oracle.load_checked(transformers.Gemma3ForConditionalGeneration, tmp_path / "out")
    before = model.get_input_embeddings().weight
    assert torch.equal(loaded.get_input_embeddings().weight, before)
    assert not torch.equal(loaded.lm_head.weight, before)


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


# each side with BERT, whose head has a bias, and with GPT-2; the head of every family, and rows of
# others than BERT's kin
KIN = ("bert-lm", "roberta", "megatron-bert", "visual-bert", "blip")
WHOLE = ("bert-mlm",)
PAIRS = usual(
    itertools.product(FAMILIES, SIDES),
    lambda pair: (
        pair[0] in WHOLE
        or pair[1] == "head"
        or (pair[1] in ("ensured", "rows") and pair[0] == "bart")
    ),
)


@pytest.mark.parametrize(("name", "trained"), PAIRS)
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

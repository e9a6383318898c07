"""Trained token rows on live models: embeddings, the heads tied to them, scaled embeddings."""

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from tests.support.beside_peft import check_merging, compare

SIZES = {
    "vocab_size": 20,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
IDS = torch.tensor([[1, 2, 3, 4, 0], [5, 3, 1, 3, 2]])


def logits(model: nn.Module) -> torch.Tensor:
    if model.config.is_encoder_decoder:
        return model(input_ids=IDS, decoder_input_ids=IDS).logits
    return model(input_ids=IDS).logits


def seeded(make):
    def made():
        torch.manual_seed(0)
        return make()

    return made


MODELS = {
    "llama": seeded(lambda: LlamaForCausalLM(LlamaConfig(**SIZES))),
    "tied": seeded(lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True))),
    "gemma3": seeded(lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, head_dim=8))),
    "gpt2": seeded(
        lambda: GPT2LMHeadModel(
            GPT2Config(vocab_size=20, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.0,
                       embd_pdrop=0.0, attn_pdrop=0.0)
        )
    ),
    "t5": seeded(
        lambda: T5ForConditionalGeneration(
            T5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2,
                     dropout_rate=0.0, decoder_start_token_id=0)
        )
    ),
    "bert": seeded(
        lambda: BertForMaskedLM(
            BertConfig(vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                       num_attention_heads=2, hidden_dropout_prob=0.0,
                       attention_probs_dropout_prob=0.0)
        )
    ),
}  # fmt: skip
Q = ["q_proj"]
CASES = {
    "list": ("llama", {"target_modules": Q, "trainable_token_indices": [3, 1]}),
    "names": ("llama", {"target_modules": Q, "trainable_token_indices": {"embed_tokens": [5, 3]}}),
    "two": (
        "llama",
        {
            "target_modules": Q,
            "trainable_token_indices": {"embed_tokens": [1, 3], "lm_head": [4, 1, 2]},
        },
    ),
    "padding": ("llama", {"target_modules": Q, "trainable_token_indices": [0, 3]}),
    "tied": ("tied", {"target_modules": Q, "trainable_token_indices": [3, 1]}),
    "tied, said": (
        "tied",
        {"target_modules": Q, "trainable_token_indices": [3, 1], "ensure_weight_tying": True},
    ),
    "tied, the same": (
        "tied",
        {
            "target_modules": Q,
            "trainable_token_indices": {"embed_tokens": [1, 3], "lm_head": [1, 3]},
        },
    ),
    "tied, different": (
        "tied",
        {
            "target_modules": Q,
            "trainable_token_indices": {"embed_tokens": [1, 3], "lm_head": [1, 4]},
        },
    ),
    "tied, head": (
        "tied",
        {"target_modules": Q, "trainable_token_indices": {"lm_head": [1, 4]}},
    ),
    "LoRA on the head": (
        "tied",
        {"target_modules": [*Q, "lm_head"], "trainable_token_indices": [1, 4]},
    ),
    "another head's copy": (
        "llama",
        {"target_modules": Q, "trainable_token_indices": [1, 4], "modules_to_save": ["lm_head"]},
    ),
    "biases": ("tied", {"target_modules": Q, "trainable_token_indices": [1, 4], "bias": "all"}),
    "scaled": ("gemma3", {"target_modules": Q, "trainable_token_indices": [2, 3]}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn"], "trainable_token_indices": [2, 3]}),
    "t5": ("t5", {"target_modules": ["q"], "trainable_token_indices": [2, 3]}),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_pefts(case, tmp_path):
    model, settings = CASES[case]
    _, adapters = compare(MODELS[model], logits, tmp_path, r=4, **settings)
    check_merging(adapters, logits)

"""Values trained in full on live models: modules_to_save and biases, beside the base."""

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from tests.support.beside_peft import check_merging, compare

LLAMA = {
    "vocab_size": 20,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
BERT = {
    "vocab_size": 20,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
IDS = torch.arange(12).reshape(2, 6) + 1


def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=IDS).logits


def seeded(make):
    def made():
        torch.manual_seed(0)
        model = make()
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name.lower():
                nn.init.normal_(parameter, 0.5, 0.3)
        return model

    return made


MODELS = {
    "llama": seeded(lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, attention_bias=True))),
    "tied": seeded(lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=True))),
    "llama_cls": seeded(lambda: LlamaForSequenceClassification(LlamaConfig(**LLAMA))),
    "bert_cls": seeded(lambda: BertForSequenceClassification(BertConfig(**BERT))),
    "bert": seeded(lambda: BertForMaskedLM(BertConfig(**BERT))),
}
QV = ["q_proj", "v_proj"]
CASES = {
    "head": ("llama", {"target_modules": QV, "modules_to_save": ["lm_head"]}),
    "head and target": (
        "llama",
        {"target_modules": [*QV, "lm_head"], "modules_to_save": ["lm_head"]},
    ),
    "norm": ("llama", {"target_modules": QV, "modules_to_save": ["input_layernorm"]}),
    "block": (
        "llama",
        {"target_modules": [*QV, "gate_proj"], "modules_to_save": ["layers.0.self_attn"]},
    ),
    "tied head": ("tied", {"target_modules": QV, "modules_to_save": ["lm_head"]}),
    "tied embedding": ("tied", {"target_modules": QV, "modules_to_save": ["embed_tokens"]}),
    "tied both": (
        "tied",
        {"target_modules": QV, "modules_to_save": ["embed_tokens", "lm_head"]},
    ),
    "tied together": (
        "tied",
        {"target_modules": QV, "modules_to_save": ["lm_head"], "ensure_weight_tying": True},
    ),
    "score": ("llama_cls", {"target_modules": QV, "task_type": "SEQ_CLS"}),
    "classifier": ("bert_cls", {"target_modules": ["query"], "task_type": "SEQ_CLS"}),
    "all biases": ("llama", {"target_modules": QV, "bias": "all"}),
    "own biases": ("llama", {"target_modules": QV, "bias": "lora_only"}),
    "all of bert": ("bert", {"target_modules": ["query", "dense"], "bias": "all"}),
    "own of bert": ("bert", {"target_modules": ["query"], "bias": "lora_only"}),
    "biases and a head": (
        "bert_cls",
        {"target_modules": ["query"], "bias": "all", "modules_to_save": ["classifier"]},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_pefts(case, tmp_path):
    model, settings = CASES[case]
    _, adapters = compare(MODELS[model], logits, tmp_path, r=4, **settings)
    check_merging(adapters, logits)

"""Tiny models that run, and PEFT's with the same adapter."""

from pathlib import Path

import torch
from torch import nn

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}


def llama(seed: int = 0, dtype: torch.dtype = torch.float32, **sizes) -> nn.Module:
    """A tiny llama with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **sizes})).to(dtype).eval()


def on_meta(**sizes) -> nn.Module:
    """A llama without values."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**{**SIZES, **sizes})).eval()


def tokens(rows: int = 2, length: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randint(
        0, SIZES["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(seed)
    )


def peft_of(folder: Path, model: nn.Module, trainable: bool = True, **options) -> nn.Module:
    """PEFT's model with the adapter of a folder."""
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(folder), is_trainable=trainable, **options).eval()

"""Trainable tensors of PEFT models as training loops save them, with the adapter's name in the
keys: `python make_training_state.py` fills training-state/.

Made with PEFT 0.21.2, transformers 5.24, torch 2.13; the config is PEFT's own.
"""

import shutil
import warnings
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent
SHAPE = {
    "vocab_size": 20, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "tie_word_embeddings": False,
}  # fmt: skip
CASES = {
    "lora": {"target_modules": ["q_proj", "v_proj", "embed_tokens"], "lora_alpha": 6,
             "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 9}},
    "dora": {"target_modules": ["q_proj", "down_proj"], "lora_alpha": 5, "use_dora": True},
}  # fmt: skip


def make(name: str, options: dict) -> None:
    torch.manual_seed(7)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    config = LoraConfig(r=3, base_model_name_or_path="tiny/model", **options)
    peft_model = get_peft_model(model, config)
    for key, parameter in peft_model.named_parameters():
        if "lora_" in key and "magnitude" not in key:
            torch.nn.init.normal_(parameter)
    home = HERE / "training-state" / name
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    save_file(
        {k: p.detach() for k, p in peft_model.named_parameters() if p.requires_grad},
        home / "adapter.safetensors",
    )
    peft_model.peft_config["default"].save_pretrained(home)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for case, options in CASES.items():
        make(case, options)

"""Adapters with the keys of Tinker's checkpoints: `python make_tinker.py` fills tinker/.

The service writes them, so no code of its own does so here; what its cookbook (0.6.1) reads is the
reference, and deltas/tinker_<case>/ is what its build_lora_adapter makes of each, for PEFT.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from tinker_cookbook.weights import build_lora_adapter
from transformers import LlamaConfig, Qwen3MoeConfig
from transformers.models.auto import AutoModelForCausalLM

HERE = Path(__file__).parent
SIZES = {
    "vocab_size": 20, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4,
}  # fmt: skip
MOE = Qwen3MoeConfig(
    **SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, decoder_sparse_step=1
)
DENSE = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
MLP = {"mlp.gate_proj": (24, 16), "mlp.up_proj": (24, 16), "mlp.down_proj": (16, 24)}
OUT = {"q_proj": 16, "k_proj": 8, "v_proj": 8, "o_proj": 16}
EXPERTS = {"w1": (8, 16), "w3": (8, 16), "w2": (16, 8)}
R = 3


def pair(state: dict, module: str, a: tuple[int, ...], b: tuple[int, ...]) -> None:
    state[f"base_model.model.{module}.lora_A.weight"] = torch.randn(a)
    state[f"base_model.model.{module}.lora_B.weight"] = torch.randn(b)


def make(name: str, config, *, tied: bool = False) -> None:
    torch.manual_seed(7)
    config.tie_word_embeddings = tied
    layer, state = "model.layers.0", {}
    for part in DENSE:
        pair(state, f"{layer}.{part}", (R, 16), (OUT[part.split(".")[1]], R))
    if config is MOE:
        for part, (out, width) in EXPERTS.items():
            shared = part != "w2"  # one a of all experts, as the service trains them
            a, b = (1 if shared else 4, R, width), (4 if shared else 1, out, R)
            pair(state, f"{layer}.mlp.experts.{part}", a, b)
    else:
        for part, (out, width) in MLP.items():
            pair(state, f"{layer}.{part}", (R, width), (out, R))
    pair(state, "model.unembed_tokens", (R, 16), (20, R))
    home, base, made = (HERE / p for p in (f"tinker/{name}", "base", f"../deltas/tinker_{name}"))
    for folder in (home, base, made):
        shutil.rmtree(folder, ignore_errors=True)
    home.mkdir(parents=True)
    save_file(state, home / "adapter_model.safetensors")
    settings = {"base_model_name_or_path": "tiny/model", "lora_alpha": 32, "r": R,
                "peft_type": "LORA", "target_modules": "all-linear"}  # fmt: skip
    (home / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    build_lora_adapter(base_model=str(base), adapter_path=str(home), output_path=str(made))
    shutil.rmtree(base)
    written = made / "adapter_config.json"  # names the base by its path on this machine
    written.write_text(written.read_text().replace(str(base), "tiny/model"))


if __name__ == "__main__":
    make("dense", LlamaConfig(**SIZES))
    make("tied", LlamaConfig(**SIZES), tied=True)
    make("experts", MOE)

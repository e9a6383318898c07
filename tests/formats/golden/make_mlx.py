"""Adapters of mlx-lm, written by its own code: `python make_mlx.py` fills mlx/ beside this file.

Made with mlx 0.32.4 (mlx-cpu) and mlx-lm 0.32.2. Each case is a folder as `mlx_lm.lora` leaves it;
deltas/ has what fusing adds to the weights of its model.
"""

import shutil
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from mlx_lm.models import llama, qwen3_moe
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import save_config

HERE = Path(__file__).parent
LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "rms_norm_eps": 1e-5,
    "vocab_size": 20,
    "rope_theta": 10000.0,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
MOE = {
    "model_type": "qwen3_moe",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 8,
    "rms_norm_eps": 1e-5,
    "vocab_size": 20,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "max_position_embeddings": 64,
    "norm_topk_prob": True,
}
ATTENTION = ["self_attn.q_proj", "self_attn.v_proj"]
CASES = {
    "lora": (LLAMA, "lora", 1, [*ATTENTION, "mlp.down_proj", "model.embed_tokens", "lm_head"]),
    "dora": (LLAMA, "dora", 2, ATTENTION),
    "experts": (MOE, "lora", 1, ["self_attn.o_proj", "mlp.switch_mlp.gate_proj",
                                 "mlp.switch_mlp.up_proj", "mlp.switch_mlp.down_proj"]),
}  # fmt: skip


def make(name, config, kind, layers, keys):
    home = HERE / "mlx" / name
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    mx.random.seed(7)
    module = {"llama": llama, "qwen3_moe": qwen3_moe}[config["model_type"]]
    model = module.Model(module.ModelArgs.from_dict(config))
    model.update(tree_map(lambda one: 0.5 * mx.random.normal(one.shape), model.parameters()))
    base = dict(tree_flatten(model.parameters()))
    model.freeze()
    settings = {"rank": 3, "dropout": 0.0, "scale": 2.5, "keys": keys}
    linear_to_lora_layers(model, layers, settings, use_dora=kind == "dora")
    trained = tree_flatten(model.trainable_parameters())
    model.update(tree_unflatten([(k, mx.random.normal(v.shape)) for k, v in trained]))
    if kind == "dora":
        model.update(tree_unflatten([(k, mx.abs(v) + 1) for k, v in trained if k.endswith(".m")]))
    # as mlx_lm.tuner.trainer and mlx_lm.lora save
    mx.save_safetensors(
        str(home / "adapters.safetensors"), dict(tree_flatten(model.trainable_parameters()))
    )
    arguments = {"fine_tune_type": kind, "num_layers": layers, "lora_parameters": settings}
    save_config(arguments | {"model": "tiny", "seed": 7}, home / "adapter_config.json")
    if kind == "dora":
        return  # its delta is of the base too
    fused = [(k, m.fuse()) for k, m in model.named_modules() if hasattr(m, "fuse")]
    model.update_modules(tree_unflatten(fused))
    merged = dict(tree_flatten(model.parameters()))
    deltas = HERE.parent / f"deltas/mlx_{name}.safetensors"
    deltas.parent.mkdir(exist_ok=True)
    names = [f"{k}.weight" for k, _ in fused]
    mx.save_safetensors(str(deltas), {k: merged[k] - base[k] for k in names}, {"format": "pt"})


if __name__ == "__main__":
    for case, arguments in CASES.items():
        make(case, *arguments)

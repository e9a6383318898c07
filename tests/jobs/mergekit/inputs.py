"""A tiny Llama and five LoRAs of drawn numbers, and recipes of mergekit over them."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

SIZE, INNER, LAYERS, VOCAB, RANK = 16, 24, 3, 32, 4
SHAPES = {
    "self_attn.q_proj": (SIZE, SIZE),
    "self_attn.k_proj": (SIZE, SIZE),
    "self_attn.v_proj": (SIZE, SIZE),
    "self_attn.o_proj": (SIZE, SIZE),
    "mlp.gate_proj": (INNER, SIZE),
    "mlp.up_proj": (INNER, SIZE),
    "mlp.down_proj": (SIZE, INNER),
}
ADAPTERS = {
    "a": ["self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"],
    "b": ["self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"],
    "c": ["self_attn.q_proj", "self_attn.k_proj"],
    "small": ["self_attn.q_proj", "mlp.up_proj"],
    "smaller": ["self_attn.q_proj", "mlp.up_proj"],
}
SMALL = {"small": 1e-3, "smaller": 3e-4}
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": SIZE,
    "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": 2,
    "num_key_value_heads": 2, "vocab_size": VOCAB, "tie_word_embeddings": False,
    "dtype": "float32", "torch_dtype": "float32",
}  # fmt: skip


def write_inputs(folder: Path) -> None:
    """`base` and the adapters in this folder."""
    draw = torch.Generator().manual_seed(3)
    normal = lambda *shape: torch.randn(*shape, generator=draw)
    tensors = {"model.embed_tokens.weight": normal(VOCAB, SIZE), "model.norm.weight": normal(SIZE)}
    tensors["lm_head.weight"] = normal(VOCAB, SIZE)
    for layer in range(LAYERS):
        for name, shape in SHAPES.items():
            tensors[f"model.layers.{layer}.{name}.weight"] = normal(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{name}.weight"] = normal(SIZE)
    (folder / "base").mkdir()
    save_file(tensors, folder / "base/model.safetensors", {"format": "pt"})
    (folder / "base/config.json").write_text(json.dumps(CONFIG))
    for adapter, modules in ADAPTERS.items():
        factors = {}
        for layer in range(LAYERS):
            for name in modules:
                key, (out, inputs) = f"base_model.model.model.layers.{layer}.{name}", SHAPES[name]
                factors[f"{key}.lora_A.weight"] = normal(RANK, inputs) / 4
                b = normal(out, RANK) / 4
                factors[f"{key}.lora_B.weight"] = b * SMALL.get(adapter, 1)
        config = {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 2 * RANK,
            "target_modules": [name.rpartition(".")[2] for name in modules],
            "base_model_name_or_path": "base",
        }  # fmt: skip
        (folder / adapter).mkdir()
        save_file(factors, folder / adapter / "adapter_model.safetensors", {"format": "pt"})
        (folder / adapter / "adapter_config.json").write_text(json.dumps(config))


MODELS = """
base_model: {base}
models:
  - model: {base}+{a}
    parameters: {{weight: 0.7{more}}}
  - model: {base}+{b}
    parameters: {{weight: -0.4{more}}}
  - model: {base}+{c}
    parameters: {{weight: 1.2{more}}}
"""
LINEAR = """
models:
  - model: {base}+{a}
    parameters: {{weight: 0.7}}
  - model: {base}+{c}
    parameters: {{weight: 0.5}}
  - model: {base}
    parameters: {{weight: 0.3}}
"""
GRADIENTS = """
merge_method: ties
base_model: {base}
dtype: float32
slices:
  - sources:
      - model: {base}
        layer_range: [0, 3]
      - model: {base}+{a}
        layer_range: [0, 3]
        parameters:
          density: [1, 0.4, 0.2]
          weight:
            - filter: self_attn
              value: [0.2, 1.0]
            - value: 0.5
      - model: {base}+{b}
        layer_range: [0, 3]
        parameters:
          density: 0.6
          weight: [0, 0.3, 0.7, 1]
parameters:
  normalize: false
  int8_mask: true
  lambda: 0.9
"""
PAIR = """
base_model: {base}
models:
  - model: {base}+{a}
    parameters: {{weight: 0.7}}
  - model: {base}+{b}
    parameters: {{weight: [0.1, 0.9]}}
"""
PLAIN = """
base_model: {base}
models:
  - model: {base}+{a}
  - model: {base}+{b}
"""
RECIPES = {
    "linear": "merge_method: linear" + LINEAR,
    "task_arithmetic": "merge_method: task_arithmetic" + MODELS,
    "task_arithmetic-normalized": "merge_method: task_arithmetic\nparameters: {{normalize: true}}"
    + MODELS,
    "ties": "merge_method: ties" + MODELS,
    "ties-rescaled": "merge_method: ties\nparameters: {{rescale: true, normalize: false}}" + MODELS,
    "gradients": GRADIENTS,
    "breadcrumbs": "merge_method: breadcrumbs" + MODELS,
    "breadcrumbs_ties": "merge_method: breadcrumbs_ties\nparameters: {{lambda: 1.5}}" + MODELS,
    "dare_ties": "merge_method: dare_ties\ndtype: float32" + MODELS,
    "dare_linear": "merge_method: dare_linear" + MODELS,
    "della": "merge_method: della\nout_dtype: bfloat16" + MODELS,
    "della_linear": "merge_method: della_linear" + MODELS,
    "sce": "merge_method: sce\nparameters: {{select_topk: 0.4}}" + PLAIN,
    "sce-small": "merge_method: sce" + PLAIN.replace("{a}", "{small}").replace("{b}", "{smaller}"),
    "nuslerp": "merge_method: nuslerp" + PAIR,
}
# of methods that draw, density 1 alone: what they draw differs
DENSITIES = {
    "ties": ", density: 0.4", "ties-rescaled": ", density: 0.4",
    "breadcrumbs": ", density: 0.6, gamma: 0.1", "breadcrumbs_ties": ", density: 0.5, gamma: 0.2",
    "dare_ties": ", density: 1", "dare_linear": ", density: 1", "della": ", density: 1",
    "della_linear": ", density: 1",
}  # fmt: skip


def recipe(name: str, folder: Path) -> str:
    """The recipe over the inputs in this folder."""
    paths = {one: str(folder / one) for one in ("base", *ADAPTERS)}
    return RECIPES[name].format(more=DENSITIES.get(name, ""), **paths)


def sampled(tensors: dict[str, torch.Tensor]) -> dict[str, list[float]]:
    """Some elements of each tensor of the layers."""
    layers = {key: value for key, value in sorted(tensors.items()) if "_proj" in key}
    return {
        key: [float(f"{x:.7g}") for x in value.float().flatten()[::71].tolist()]
        for key, value in layers.items()
    }

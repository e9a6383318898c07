"""GGUF adapters of tiny models by llama.cpp's own `convert_lora_to_gguf.py`.

    python make_gguf.py LLAMA_CPP

LLAMA_CPP: `vendor/llama.cpp` of llama-cpp-python's source distribution. Versions: llama-cpp-python
0.3.36, transformers 5.24.0, PEFT 0.21.2, torch 2.13.0.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

OUT = Path(__file__).parent / "gguf"
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
EXPERTS = 3
OF_LINEAR_ATTENTION: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 3,
    "layer_types": ["linear_attention", "full_attention"],
    "mtp_num_hidden_layers": 1,  # which the converter wants to read
}
# name -> config, module names that are adapted, types of the file, further settings of the adapter
CASES: dict[str, tuple[Any, list[str], list[str], dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig(**SIZES), LINEAR, ["f32", "f16", "bf16", "q8_0"], {}),
    "llama_embeddings": (
        transformers.LlamaConfig(**SIZES),
        ["embed_tokens", "lm_head", "q_proj"],
        ["f32"],
        {},
    ),
    "qwen2": (
        transformers.Qwen2Config(**SIZES),
        LINEAR,
        ["f32"],
        {"alora_invocation_tokens": [3, 1, 4]},
    ),
    "qwen3_5": (
        transformers.Qwen3_5TextConfig(**SIZES | OF_LINEAR_ATTENTION),
        [*LINEAR, "in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj"],
        ["f32"],
        {},
    ),
    "gemma3": (transformers.Gemma3TextConfig(**SIZES), LINEAR, ["f32"], {}),
    "mixtral": (
        transformers.MixtralConfig(**SIZES, num_local_experts=EXPERTS),
        ["q_proj", "k_proj", "block_sparse_moe.gate"],
        ["f32"],
        {},
    ),
    "qwen3_moe": (
        transformers.Qwen3MoeConfig(**SIZES, num_experts=EXPERTS, moe_intermediate_size=16),
        ["q_proj", "k_proj"],
        ["f32"],
        {},
    ),
}


def write_adapter(folder: Path, config: Any, targets: list[str], settings: dict[str, Any]) -> None:
    """The adapter as PEFT saves it, all of its factors random."""
    torch.manual_seed(0)
    transformers.set_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    lora = LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=[name for name in targets if "." not in name],
        task_type="CAUSAL_LM",
        **settings,
    )
    peft = get_peft_model(model, lora)
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) / 4)
    peft.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink()
    path = folder / "adapter_config.json"
    settings = json.loads(path.read_text())
    settings["target_modules"] = sorted(targets)
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def add_experts(folder: Path, config: Any) -> None:
    """Factors of each expert and of the router: transformers 5 stacks the experts, so PEFT's keys
    of a model that has them apart are written here."""
    from safetensors.torch import load_file

    generator = torch.Generator().manual_seed(1)
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    width = getattr(config, "moe_intermediate_size", config.intermediate_size)
    hidden = config.hidden_size
    shapes: dict[str, tuple[int, int]] = {}
    for layer in range(config.num_hidden_layers):
        stem = f"model.layers.{layer}."
        if config.model_type == "mixtral":
            shapes[f"{stem}block_sparse_moe.gate"] = (EXPERTS, hidden)
            names, stem = ("w1", "w3", "w2"), f"{stem}block_sparse_moe."
        else:
            names, stem = ("gate_proj", "up_proj", "down_proj"), f"{stem}mlp."
        for expert in range(EXPERTS):
            for name in names:
                shape = (hidden, width) if name in ("w2", "down_proj") else (width, hidden)
                shapes[f"{stem}experts.{expert}.{name}"] = shape
    for name, (out, width) in shapes.items():
        a, b = torch.randn(2, width, generator=generator), torch.randn(out, 2, generator=generator)
        tensors[f"base_model.model.{name}.lora_A.weight"] = a / 4
        tensors[f"base_model.model.{name}.lora_B.weight"] = b / 4
    save_file(tensors, path, metadata={"format": "pt"})
    path = folder / "adapter_config.json"
    settings = json.loads(path.read_text())
    settings["target_modules"] = sorted({*settings["target_modules"], *names})
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def main(llama_cpp: Path) -> None:
    for case, (config, targets, types, settings) in CASES.items():
        folder = OUT / case
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "base").mkdir(parents=True)
        config.architectures = [
            type(transformers.AutoModelForCausalLM.from_config(config)).__name__
        ]
        config.save_pretrained(folder / "base")
        write_adapter(folder / "adapter", config, targets, settings)
        if case in ("mixtral", "qwen3_moe"):
            add_experts(folder / "adapter", config)
        for kind in types:
            arguments = ["--base", folder / "base", "--outtype", kind]
            arguments += ["--outfile", folder / f"{kind}.gguf", folder / "adapter"]
            script = llama_cpp / "convert_lora_to_gguf.py"
            subprocess.run([sys.executable, script, *arguments], check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

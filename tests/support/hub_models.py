"""A small model and adapters on the Hub of the tests, and what came of a job there."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save

LAYERS, WIDTH, RANK = 6, 128, 4


def shards(layers: int) -> list[str]:
    return [f"model-{i + 1:05d}-of-{layers:05d}.safetensors" for i in range(layers)]


SHARDS = shards(LAYERS)

WEIGHTS = "adapter_model.safetensors"
CALLS = "import adapterkit\nfrom adapterkit.bases.hub import retry, scratch\nretry.WAIT = 0.01"


def base_files(
    layers: int = LAYERS, width: int = WIDTH, projections: str = "qkv"
) -> dict[str, bytes]:
    """A checkpoint in Llama's names, one layer in each shard; whole at a glance, so that no job
    imports the model."""
    generator, files, places = np.random.default_rng(0), {}, {}
    for i, name in enumerate(shards(layers)):
        keys = [f"model.layers.{i}.self_attn.{leaf}_proj.weight" for leaf in projections]
        shape = (width, width)
        weights = {key: generator.standard_normal(shape).astype(np.float32) for key in keys}
        if i == 0:  # the ends, of which the head is tied
            embedding = np.ones((8, width), np.float32)
            weights |= {"model.embed_tokens.weight": embedding, "model.norm.weight": embedding[0]}
        files[name] = save(weights, {"format": "pt"})
        places |= dict.fromkeys(weights, name)
    config = {
        "tie_word_embeddings": True,
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": width,
        "intermediate_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 8,
    }
    files["config.json"] = json.dumps(config).encode()
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    files["model.safetensors.index.json"] = json.dumps(index).encode()
    return files


def adapter_files(seed: int = 1, layers=range(LAYERS), width: int = WIDTH) -> dict[str, bytes]:
    generator, factors = np.random.default_rng(seed), {}
    for i in layers:
        prefix = f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_"
        factors[prefix + "A.weight"] = generator.standard_normal((RANK, width)).astype(np.float32)
        factors[prefix + "B.weight"] = generator.standard_normal((width, RANK)).astype(np.float32)
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": ["q_proj"],
        "base_model_name_or_path": "org/base",
    }
    return {
        "adapter_model.safetensors": save(factors),
        "adapter_config.json": json.dumps(config).encode(),
    }


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def receipt_of(files: dict[str, bytes]) -> dict:
    return json.loads(files["adapterkit.json"])


def differing(there: dict[str, bytes], here: Path) -> list[str]:
    """The files that differ, but for the receipts."""
    local = {p.relative_to(here).as_posix(): p.read_bytes() for p in here.rglob("*") if p.is_file()}
    names = (set(there) | set(local)) - {".gitattributes", "adapterkit.json"}
    return [name for name in sorted(names) if there.get(name) != local.get(name)]

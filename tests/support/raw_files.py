"""Makes files by hand, byte by byte: headers that no library would write, tiny bases and adapters
held in memory."""

import json
import struct
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

WIDTH, HIDDEN, ROWS, RANK = 16, 24, 20, 4
DTYPES = {
    "float32": "F32",
    "float16": "F16",
    "float64": "F64",
    "int64": "I64",
    "int32": "I32",
    "uint8": "U8",
    "bool": "BOOL",
}
SIZES = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8, "I64": 8, "I32": 4, "U8": 1, "BOOL": 1}
PREFIX = "base_model.model."


@dataclass(eq=False)  # as folders are: a kind of base is kept for each
class MemoryFolder:
    """A folder that is a dict of bytes."""

    name: str
    content: dict[str, bytes]
    origin: dict = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return self.name

    def files(self) -> dict[str, int]:
        return {name: len(data) for name, data in self.content.items()}

    def read(self, name: str, start: int, stop: int) -> bytes:
        return self.content[name][start:stop]

    def path(self, name: str) -> Path:
        raise AssertionError(f"a plan asked for the whole of {name}")

    def prefetch(self, names: list[str]) -> None:
        pass

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in self.content.items():
            (folder / name).write_bytes(data)
        return folder


@dataclass(frozen=True)
class Stored:
    """A tensor as a file holds it; its bytes need not be what its dtype and shape say."""

    dtype: str
    shape: tuple
    data: bytes

    @staticmethod
    def of(array: np.ndarray) -> "Stored":
        return Stored(DTYPES[array.dtype.name], array.shape, array.tobytes())


def file_of(header: dict | str | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file of any header, with any length prefix."""
    text = json.dumps(header) if isinstance(header, dict) else header
    text = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensors_file(tensors: dict[str, Stored]) -> bytes:
    header, at = {}, 0
    for key, tensor in tensors.items():
        header[key] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [at, at + len(tensor.data)],
        }
        at += len(tensor.data)
    return file_of(header, b"".join(t.data for t in tensors.values()))


def normal(*shape: int, seed: int = 0) -> Stored:
    """Normal values in float32 that float16 can hold as well."""
    values = np.random.default_rng((seed, *shape)).standard_normal(shape)
    return Stored.of(values.astype(np.float16).astype(np.float32))


def base_tensors() -> dict[str, Stored]:
    shapes = {
        "model.embed.weight": (ROWS, WIDTH),
        "model.layers.0.q_proj.weight": (WIDTH, WIDTH),
        "model.layers.0.up_proj.weight": (HIDDEN, WIDTH),
        "model.layers.0.up_proj.bias": (HIDDEN,),
        "model.layers.0.down_proj.weight": (WIDTH, HIDDEN),
        "model.layers.1.q_proj.weight": (WIDTH, WIDTH),
        "model.layers.1.up_proj.weight": (HIDDEN, WIDTH),
        "model.layers.1.up_proj.bias": (HIDDEN,),
        "model.layers.1.down_proj.weight": (WIDTH, HIDDEN),
        "model.conv.weight": (8, 6, 3, 3),
        "model.norm.weight": (WIDTH,),
        "score.weight": (3, WIDTH),
    }
    return {key: normal(*shape, seed=i) for i, (key, shape) in enumerate(shapes.items())}


def base(**config) -> MemoryFolder:
    """A base whose config names no model of transformers, so that nothing of it is imported."""
    files = {
        "model.safetensors": tensors_file(base_tensors()),
        "config.json": json.dumps({"hidden_size": WIDTH} | config).encode(),
    }
    return MemoryFolder("base", files)


def llama() -> MemoryFolder:
    """One layer of a Llama, whose names and orientations transformers' sources prove without being
    imported."""
    layer = "model.layers.0."
    shapes = {
        "model.embed_tokens.weight": (ROWS, WIDTH),
        "lm_head.weight": (ROWS, WIDTH),
        "model.norm.weight": (WIDTH,),
    }
    shapes |= {f"{layer}self_attn.{name}_proj.weight": (WIDTH, WIDTH) for name in "qkvo"}
    shapes |= {f"{layer}mlp.{name}_proj.weight": (HIDDEN, WIDTH) for name in ("gate", "up")}
    shapes |= {f"{layer}mlp.down_proj.weight": (WIDTH, HIDDEN)}
    shapes |= {f"{layer}{name}_layernorm.weight": (WIDTH,) for name in ("input", "post_attention")}
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": WIDTH,
        "vocab_size": ROWS, "intermediate_size": HIDDEN, "num_hidden_layers": 1,
        "num_attention_heads": 2, "tie_word_embeddings": False,
    }  # fmt: skip
    tensors = tensors_file({key: normal(*shape) for key, shape in shapes.items()})
    return MemoryFolder(
        "llama", {"model.safetensors": tensors, "config.json": json.dumps(config).encode()}
    )


@dataclass
class AdapterFiles:
    """An adapter before it is written: its config and its tensors."""

    config: dict
    tensors: dict[str, Stored]

    def folder(self, name: str = "adapter") -> MemoryFolder:
        config = json.dumps(self.config).encode()
        return MemoryFolder(
            name,
            {
                "adapter_config.json": config,
                "adapter_model.safetensors": tensors_file(self.tensors),
            },
        )


def adapter_config(**changes) -> dict:
    config = {
        "peft_type": "LORA", "r": RANK, "lora_alpha": 8, "bias": "none", "use_dora": False,
        "use_rslora": False, "lora_bias": False, "lora_dropout": 0.0,
        "target_modules": ["q_proj", "up_proj", "down_proj"], "modules_to_save": None,
        "rank_pattern": {}, "alpha_pattern": {}, "base_model_name_or_path": "org/base",
        "init_lora_weights": True, "task_type": None, "megatron_core": "megatron.core",
        "fan_in_fan_out": False,
    }  # fmt: skip
    return config | changes


def pair(
    module: str, outputs: int, inputs: int, rank: int = RANK, seed: int = 1
) -> dict[str, Stored]:
    return {
        f"{PREFIX}{module}.lora_A.weight": normal(rank, inputs, seed=seed),
        f"{PREFIX}{module}.lora_B.weight": normal(outputs, rank, seed=seed + 1),
    }


def plain() -> AdapterFiles:
    """LoRA on linear layers of two shapes, one of another rank."""
    tensors = pair("model.layers.0.q_proj", WIDTH, WIDTH) | pair(
        "model.layers.1.q_proj", WIDTH, WIDTH, seed=5
    )
    tensors |= pair("model.layers.0.up_proj", HIDDEN, WIDTH, seed=7) | pair(
        "model.layers.0.down_proj", WIDTH, HIDDEN, 2, 9
    )
    return AdapterFiles(
        adapter_config(rank_pattern={"down_proj": 2}, alpha_pattern={"q_proj": 3.5}), tensors
    )


def decomposed() -> AdapterFiles:
    """DoRA, with biases of b."""
    tensors = {}
    for layer in (0, 1):
        module = f"model.layers.{layer}.up_proj"
        tensors |= pair(module, HIDDEN, WIDTH, seed=layer)
        tensors[f"{PREFIX}{module}.lora_magnitude_vector"] = normal(HIDDEN, seed=layer)
        tensors[f"{PREFIX}{module}.lora_B.bias"] = normal(HIDDEN, seed=layer + 3)
    return AdapterFiles(
        adapter_config(use_dora=True, lora_bias=True, target_modules=["up_proj"]), tensors
    )


def everything_else() -> AdapterFiles:
    """An embedding, a convolution, a saved module, a trained bias and trained token rows."""
    tensors = {
        f"{PREFIX}model.embed.lora_embedding_A": normal(RANK, ROWS, seed=1),
        f"{PREFIX}model.embed.lora_embedding_B": normal(WIDTH, RANK, seed=2),
        f"{PREFIX}model.conv.lora_A.weight": normal(RANK, 6, 3, 3, seed=3),
        f"{PREFIX}model.conv.lora_B.weight": normal(8, RANK, 1, 1, seed=4),
        f"{PREFIX}score.weight": normal(3, WIDTH, seed=5),
        f"{PREFIX}model.layers.0.up_proj.bias": normal(HIDDEN, seed=6),
        f"{PREFIX}model.layers.1.up_proj.bias": normal(HIDDEN, seed=7),
    }
    config = adapter_config(bias="all", modules_to_save=["score"], target_modules=["embed", "conv"])
    return AdapterFiles(config, tensors)


def token_rows() -> AdapterFiles:
    tensors = pair("model.layers.0.q_proj", WIDTH, WIDTH)
    tensors[f"{PREFIX}model.embed.token_adapter.trainable_tokens_delta"] = normal(3, WIDTH, seed=8)
    return AdapterFiles(
        adapter_config(trainable_token_indices={"embed": [0, 7, 19]}, target_modules=["q_proj"]),
        tensors,
    )


GOLDEN = {
    "plain": plain,
    "decomposed": decomposed,
    "everything_else": everything_else,
    "token_rows": token_rows,
}

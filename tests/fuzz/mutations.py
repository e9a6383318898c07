"""Damaged and odd versions of an adapter's files: its keys, shapes, values, metadata, settings and
bytes.

A mutation is drawn by a seed. What a file holds is edited in memory, so that what no library would
write is written too.
"""

import io
import json
import math
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import yaml

from tests.support.raw_files import SIZES, Stored, file_of

TORCH = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in TORCH.items()}


@dataclass(frozen=True)
class Files:
    """The files of an adapter: the weights, the settings beside them if there are any."""

    name: str  # of the weights
    weights: bytes
    config: str = ""  # the name of the settings
    settings: bytes = b""
    others: dict[str, bytes] = field(default_factory=dict)  # further settings, as they are

    @property
    def container(self) -> str:
        ending = self.name.rpartition(".")[2]
        return ending if ending in ("safetensors", "gguf") else "pickle"


@dataclass(frozen=True)
class Parts:
    """What the weights hold."""

    tensors: dict[str, Stored]
    metadata: dict[str, object]


def parse(files: Files) -> Parts:
    """The parts of a file of weights."""
    if files.container == "pickle":
        loaded = torch.load(io.BytesIO(files.weights), weights_only=True)
        loaded = loaded.get("model", loaded)  # as litgpt wraps it
        tensors = {key: value for key, value in loaded.items() if isinstance(value, torch.Tensor)}
        metadata = {key: value for key, value in loaded.items() if key not in tensors}
        return Parts({key: stored(value) for key, value in tensors.items()}, metadata)
    if files.container == "gguf":
        return _parse_gguf(files.weights)
    (length,) = struct.unpack("<Q", files.weights[:8])
    header, data = json.loads(files.weights[8 : 8 + length]), files.weights[8 + length :]
    metadata = header.pop("__metadata__", None) or {}
    tensors = {
        key: Stored(spec["dtype"], tuple(spec["shape"]), data[slice(*spec["data_offsets"])])
        for key, spec in header.items()
    }
    return Parts(tensors, metadata)


def stored(tensor: torch.Tensor) -> Stored:
    data = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return Stored(NAMES[tensor.dtype], tuple(tensor.shape), data)


def written(files: Files, parts: Parts) -> Files:
    """The files with other parts."""
    if files.container == "pickle":
        tensors = {
            key: torch.tensor(list(t.data), dtype=torch.uint8).view(TORCH[t.dtype]).reshape(t.shape)
            for key, t in parts.tensors.items()
            if t.dtype in TORCH and len(t.data) == SIZES[t.dtype] * math.prod(t.shape)
        }
        buffer = io.BytesIO()
        torch.save(tensors | parts.metadata, buffer)
        return replace(files, weights=buffer.getvalue())
    if files.container == "gguf":
        return replace(files, weights=_gguf(parts))
    header: dict[str, object] = {"__metadata__": parts.metadata} if parts.metadata else {}
    at, data = 0, []
    for key, tensor in parts.tensors.items():
        offsets = [at, at + len(tensor.data)]
        header[key] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        at += len(tensor.data)
        data.append(tensor.data)
    return replace(files, weights=file_of(header, b"".join(data)))


# -- GGUF ------------------------------------------------------------------------------------------

GGUF_TYPES = {"F32": 0, "F16": 1, "BF16": 30}


def _parse_gguf(data: bytes) -> Parts:
    """Tensors of floats, and settings as (type, raw value)."""
    at = 24
    count_tensors, count_fields = struct.unpack("<QQ", data[8:24])

    def take(size: int) -> bytes:
        nonlocal at
        at += size
        return data[at - size : at]

    def number(letters: str) -> int:
        return struct.unpack("<" + letters, take(struct.calcsize(letters)))[0]

    def skip(kind: int) -> None:
        sizes = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
        if kind == 8:
            take(number("Q"))
        elif kind == 9:
            inner, length = number("I"), number("Q")
            for _ in range(length):
                skip(inner)
        else:
            take(sizes[kind])

    metadata: dict[str, object] = {}
    for _ in range(count_fields):
        key, kind = take(number("Q")).decode(), number("I")
        start = at
        skip(kind)
        metadata[key] = (kind, data[start:at])
    infos = []
    for _ in range(count_tensors):
        key, axes = take(number("Q")).decode(), number("I")
        shape = tuple(number("Q") for _ in range(axes))[::-1]
        infos.append((key, shape, number("I"), number("Q")))
    # every value here is a pair, which a checker does not see
    _, raw = metadata.get("general.alignment", (4, struct.pack("<I", 32)))
    align = struct.unpack("<I", raw)[0]
    at += -at % align
    names = {kind: name for name, kind in GGUF_TYPES.items()}
    sizes = {kind: SIZES[name] for kind, name in names.items()}
    tensors = {
        key: Stored(
            names.get(kind, f"Q{kind}"),
            shape,
            data[at + offset : at + offset + _gguf_bytes(kind, shape, sizes)],
        )
        for key, shape, kind, offset in infos
    }
    return Parts(tensors, metadata)


def _gguf_bytes(kind: int, shape: tuple[int, ...], sizes: dict[int, int]) -> int:
    """Bytes of a tensor; of the types of blocks only Q8_0 (8) is in the samples."""
    count = math.prod(shape)
    return count * sizes[kind] if kind in sizes else count // 32 * 34


def _gguf(parts: Parts) -> bytes:
    text = lambda word: struct.pack("<Q", len(word.encode())) + word.encode()
    head = b"GGUF" + struct.pack("<IQQ", 3, len(parts.tensors), len(parts.metadata))
    for key, value in parts.metadata.items():
        kind, raw = value if isinstance(value, tuple) else (8, text(str(value)))
        head += text(key) + struct.pack("<I", kind) + raw
    body = b""
    for key, tensor in parts.tensors.items():
        kind = GGUF_TYPES.get(tensor.dtype)
        kind = int(tensor.dtype[1:]) if kind is None and tensor.dtype[0] == "Q" else kind
        head += text(key) + struct.pack("<I", len(tensor.shape))
        head += struct.pack(f"<{len(tensor.shape)}Q", *tensor.shape[::-1])
        head += struct.pack("<IQ", 99 if kind is None else kind, len(body))
        body += tensor.data + b"\0" * (-len(tensor.data) % 32)
    return head + b"\0" * (-len(head) % 32) + body


# -- mutations -------------------------------------------------------------------------------------

Random = random.Random
OTHER_WORDS = (
    (".lora_down.", ".lora_up."),
    (".lora_down.weight", ".lora_A.weight"),
    (".lora_up.weight", ".lora_B.weight"),
    ("lora_A", "lora_B"),
    ("lora_A.weight", "lora_A.default.weight"),
    ("lora_a", "lora_b"),
    (".weight", ""),
    (".weight", ".bias"),
    (".alpha", ".scale"),
    ("hada_w1", "hada_w2"),
    ("lokr_w1", "lokr_w2"),
    ("lora_unet_", "lora_te_"),
    ("lora_te1_", "lora_te2_"),
    ("lora_unet_", "lora_transformer_"),
    ("unet.", "transformer."),
    ("transformer.", "transformer_2."),
    ("transformer.", "text_encoder."),
    ("diffusion_model.", ""),
    ("base_model.model.", ""),
    ("base_model.model.", "base_model.model.model."),
    ("to_q", "to_k"),
    ("to_k", "to_x"),
    ("q_proj", "k_proj"),
    ("q_proj", "qkv_proj"),
    ("qkv", "proj"),
    ("attn", "attention"),
    ("_", "."),
    (".", "_"),
    ("blocks", "block"),
    ("layers", "layer"),
)


def rename(key: str, draw: Random) -> str:
    """Another name: near, far, of another format, of another layer."""
    ways: list[str] = [key + "x", "x" + key, key[:-1], key.upper(), "model." + key, key + ".weight"]
    ways += [key.replace(old, new) for old, new in OTHER_WORDS if old in key]
    digits = [at for at, letter in enumerate(key) if letter.isdigit()]
    for at in digits:
        ways.append(key[:at] + draw.choice("0123456789") + key[at + 1 :])
        ways.append(key[:at] + "99" + key[at:])
    at = draw.randrange(len(key) + 1)
    ways += [key[:at] + key[at + 1 :], key[:at] + draw.choice("._x0é\n") + key[at:]]
    return draw.choice(ways)


def keys(parts: Parts, draw: Random) -> Parts:
    """A key is gone, renamed, doubled, exchanged with another, or new."""
    tensors = dict(parts.tensors)
    names = list(tensors)
    key = draw.choice(names)
    match draw.randrange(7):
        case 0:
            del tensors[key]
        case 1:
            tensors = {rename(k, draw) if k == key else k: t for k, t in tensors.items()}
        case 2:
            tensors[rename(key, draw)] = tensors[key]
        case 3:
            other = draw.choice(names)
            tensors[key], tensors[other] = tensors[other], tensors[key]
        case 4:  # all keys of one module
            stem = key.split(".lora")[0].rpartition(".")[0] or key
            tensors = {k: t for k, t in tensors.items() if not k.startswith(stem)}
        case 5:  # every key in the same way
            old, new = draw.choice(OTHER_WORDS)
            tensors = {k.replace(old, new): t for k, t in tensors.items()}
        case 6:
            tensors[
                draw.choice(["step", "optimizer.state.0", "emb_params", "lora_A", "", "a.b"])
            ] = tensors[key]
    return replace(parts, tensors=tensors)


def shapes(parts: Parts, draw: Random) -> Parts:
    """A tensor has another shape or dtype, with the bytes for it."""
    key = draw.choice(list(parts.tensors))
    tensor = parts.tensors[key]
    shape, size = tensor.shape, math.prod(tensor.shape)
    others: list[tuple[int, ...]] = [shape[::-1], (size,), (1, *shape), (*shape, 1), (), (0,)]
    others += [(size, 1), (1, size)]
    for axis in range(len(shape)):
        for change in (-1, 1, shape[axis], -shape[axis] // 2):
            others.append((*shape[:axis], max(0, shape[axis] + change), *shape[axis + 1 :]))
    dtype = draw.choice([tensor.dtype] * 8 + ["I32", "U8", "BOOL", "F64", "F16", "I64"])
    width = SIZES.get(dtype)
    if width is None:  # blocks of GGUF
        return values(parts, draw)
    other = draw.choice(others)
    data = tensor.data * (1 + math.prod(other) * width // max(1, len(tensor.data)))
    changed = Stored(dtype, other, data[: math.prod(other) * width])
    return replace(parts, tensors=parts.tensors | {key: changed})


def values(parts: Parts, draw: Random) -> Parts:
    """A tensor of numbers that are none, none at all, or out of range."""
    scalars = [key for key, t in parts.tensors.items() if math.prod(t.shape) == 1]
    key = draw.choice(scalars * 3 + list(parts.tensors))
    tensor = parts.tensors[key]
    if tensor.dtype not in TORCH or not tensor.data:
        return keys(parts, draw)
    array = torch.frombuffer(bytearray(tensor.data), dtype=TORCH[tensor.dtype]).clone()
    number = draw.choice([math.nan, math.inf, 0.0, -1.0, 1e30, 3.0, 1e-30, 10.67])
    if array.dtype.is_floating_point:
        chosen = slice(None) if draw.random() < 0.5 else slice(0, 1)
        array[chosen] = number
    data = array.view(torch.uint8).numpy().tobytes()
    return replace(parts, tensors=parts.tensors | {key: replace(tensor, data=data)})


TEXTS = ("", "x", "{}", "[]", "null", '{"a": ', "NaN", "1e999", "\u202e", "sdxl_base_v1-0", "flux1")


def metadata(parts: Parts, draw: Random) -> Parts:
    """Metadata are gone, garbled, or contradict the tensors."""
    entries = dict(parts.metadata)
    if entries and draw.random() < 0.2:
        return replace(parts, metadata={})
    known = ["ss_base_model_version", "lora_adapter_metadata", "ss_network_alpha", "software"]
    key = draw.choice([*entries, *known, "format"])
    value: object = draw.choice(TEXTS)
    old = entries.get(key)
    if isinstance(old, str) and draw.random() < 0.6:
        value = _text(old, draw)
    elif isinstance(old, tuple) and draw.random() < 0.6:
        kind, raw = old
        value = (kind, raw[::-1] if kind != 8 else raw[:8] + raw[8:][::-1])
    if draw.random() < 0.3:
        entries.pop(key, None)
    else:
        entries[key] = value
    return replace(parts, metadata=entries)


def _text(old: str, draw: Random) -> str:
    """A text that was JSON with one value changed, or with characters missing."""
    try:
        tree = json.loads(old)
    except ValueError:
        tree = None
    if isinstance(tree, dict) and tree and draw.random() < 0.8:
        return json.dumps(_setting(tree, draw))
    at = draw.randrange(len(old) + 1)
    return old[:at] + draw.choice(["", "x", "\n", "9" * 400]) + old[at + draw.randrange(4) :]


def _setting(tree: dict[str, object], draw: Random) -> dict[str, object]:
    """A tree of settings with one of them gone, renamed, or of another value."""
    tree = dict(tree)
    key = draw.choice(list(tree))
    inner = tree[key]
    if isinstance(inner, dict) and inner and draw.random() < 0.7:
        return tree | {key: _setting(inner, draw)}
    match draw.randrange(3):
        case 0:
            del tree[key]
        case 1:
            tree[key + "x"] = tree.pop(key)
        case 2:
            odd = [None, True, 0, -1, 0.5, "x", "", [], ["x"], {}, {"x": 1}, {"": 3}, 10**20, 3]
            tree[key] = draw.choice([*odd, 1e300])
    return tree


def config(files: Files, draw: Random) -> Files:
    """Settings are gone, garbled, or contradict the tensors."""
    if draw.random() < 0.1:
        return replace(files, config="", settings=b"")
    if draw.random() < 0.15:
        return replace(files, settings=_bytes(files.settings, draw))
    try:
        tree = yaml.safe_load(files.settings)  # JSON is YAML
    except (yaml.YAMLError, ValueError):  # of an earlier mutation
        return files
    if not isinstance(tree, dict) or not tree:
        return files
    return replace(files, settings=json.dumps(_setting(tree, draw)).encode())


def _bytes(data: bytes, draw: Random) -> bytes:
    """Bytes that are cut, longer, or have one that is another, mostly near the start."""
    at = min(len(data) - 1, int(draw.expovariate(1 / 200)))
    match draw.randrange(4):
        case 0:
            return data[: draw.randrange(len(data))]
        case 1:
            return data + draw.randbytes(draw.choice([1, 8, 100]))
        case 2:
            return data[:at] + draw.randbytes(1) + data[at + 1 :]
    return data[:at] + data[at + draw.choice([1, 2, 8]) :]


EDITS: tuple[Callable[[Parts, Random], Parts], ...] = (keys, keys, shapes, values, metadata)


def mutant(files: Files, seed: str) -> Files:
    """The files with one mutation, seldom with two, drawn by the seed."""
    draw = Random(seed)
    for _ in range(1 if draw.random() < 0.8 else 2):
        kind = draw.random()
        if kind < 0.12:
            return replace(files, weights=_bytes(files.weights, draw))
        if kind < 0.3 and files.config:
            files = config(files, draw)
        else:
            parts = parse(files)
            if not parts.tensors:  # an earlier mutation
                break
            files = written(files, draw.choice(EDITS)(parts, draw))
    return files


def finite(data: Stored) -> bool:
    """Whether a tensor of floats has only numbers."""
    if data.dtype not in TORCH or not data.data:
        return True
    array = torch.frombuffer(bytearray(data.data), dtype=TORCH[data.dtype])
    return bool(np.isfinite(array.double().numpy()).all())

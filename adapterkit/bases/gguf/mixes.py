"""llama.cpp's mixes of types, except those for Falcon, ternary models and MXFP4.

Source: https://github.com/ggml-org/llama.cpp/blob/master/src/llama-quant.cpp.
"""

import math
import re
import struct
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from adapterkit.bases.gguf.header import TYPES, UINT32, Entry, GgufHeader

FILE_TYPE = "general.file_type"
MIXES = {  # the type of most matrices, and the number of the mix
    "f32": ("F32", 0), "f16": ("F16", 1), "bf16": ("BF16", 32), "q8_0": ("Q8_0", 7),
    "q6_k": ("Q6_K", 18), "q5_k": ("Q5_K", 17), "q5_k_m": ("Q5_K", 17), "q5_k_s": ("Q5_K", 16),
    "q5_1": ("Q5_1", 9), "q5_0": ("Q5_0", 8), "q4_k": ("Q4_K", 15), "q4_k_m": ("Q4_K", 15),
    "q4_k_s": ("Q4_K", 14), "q4_1": ("Q4_1", 3), "q4_0": ("Q4_0", 2), "q3_k_l": ("Q3_K", 13),
    "q3_k": ("Q3_K", 12), "q3_k_m": ("Q3_K", 12), "q3_k_s": ("Q3_K", 11), "q2_k": ("Q2_K", 10),
    "iq4_nl": ("IQ4_NL", 25), "iq4_xs": ("IQ4_XS", 30),
}  # fmt: skip
# for rows that are no whole blocks of 256; IQ4_NL for IQ4_XS
NARROW = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
STAY = re.compile(  # small matrices
    r"_norm\.weight|ffn_gate_(?:inp|tid2eid)\.weight|altup|laurel|^(?:token_types|position_embd)\."
    r"|per_layer_model_proj|ssm_conv1d|shortconv\.conv\.weight|indexer\.[kq]_proj\.weight"
    r"|time_mix_(?:first|[wvag]\d|decay_w[12]|lerp_fused)\.weight|attn_rel_b\.weight"
    r"|\.position_embd|sam\.(?:pos_embd|neck\.|net_)|\.rel_pos|\.patch_|a\.rvq\.|mm\.a\.code_embd"
)
KINDS = {  # of matrices, by parts of their names
    "v": r"attn_(?:v|qkv|kv_b)\.weight", "k": r"attn_k\.weight", "out": r"attn_output\.weight",
    "down": r"ffn_down", "head": r"^output\.weight", "tokens": r"^(?:per_layer_)?token_embd\.",
}  # fmt: skip
HOLDS = {  # conditions on the how-manieth matrix of how many of its kind
    "": lambda at, count: True,
    "two": lambda at, count: at < 2,
    "four": lambda at, count: at < 4,
    "sixteenth": lambda at, count: at < count // 16,
    "eighth": lambda at, count: at < count // 8,
    "more": lambda at, n: at < n // 8 or at >= 7 * n // 8 or (at - n // 8) % 3 == 2,
}
MORE = {"v": {"more": "Q6_K"}, "down": {"more": "Q6_K"}}
RULES = {  # by mix and kind: the type by the first condition that holds
    "q2_k": {"v": {"grouped": "Q4_K", "": "Q3_K"}, "down": {"": "Q3_K"}, "out": {"": "Q3_K"}},
    "q3_k_m": {"v": {"two": "Q5_K", "": "Q4_K"}, "down": {"sixteenth": "Q5_K", "": "Q4_K"},
               "out": {"": "Q4_K"}},
    "q3_k_l": {"v": {"": "Q5_K"}, "down": {"": "Q5_K"}, "out": {"": "Q5_K"}},
    "q4_k_s": {"v": {"four": "Q5_K"}, "down": {"eighth": "Q5_K"}}, "q4_k_m": MORE, "q5_k_m": MORE,
    "q4_0 weighed": {"down": {"eighth": "Q4_1"}}, "q5_0 weighed": {"down": {"eighth": "Q5_1"}},
    "iq4": {"v": {"grouped": "Q5_K"}, "down": {"eighth": "Q5_K"}},
    "iq4 weighed": {"v": {"grouped": "Q5_K"}},
}  # fmt: skip
PLAIN = ("q3_k_l", "q4_0", "q4_1", "q5_0", "q5_1", "q5_k_s", "q5_k_m", "q6_k", "q8_0")


def types_of(header: GgufHeader, mix: str, *, weighed: bool) -> dict[str, str]:
    """The types that a mix gives the matrices of a model, by name. `weighed`: there is an
    importance matrix."""
    default, number = MIXES[mix]
    mix = next(name for name in reversed(MIXES) if MIXES[name][1] == number)  # its whole name
    layer = lambda name: int(match[1]) if (match := re.match(r"blk\.(\d+)\.", name)) else -1
    entries = sorted(header.tensors, key=lambda entry: (layer(entry.name), entry.name))
    kind_of = lambda name: next((one for one, part in KINDS.items() if re.search(part, name)), "")
    counts = Counter(kind_of(entry.name) for entry in entries)
    layers, experts = _number(header, "block_count"), _number(header, "expert_count")
    heads = _number(header, "attention.head_count")
    shared = _number(header, "attention.head_count_kv") or heads or 1
    is_70b = layers == 80 and heads != shared and header.architecture in ("llama", "qwen2")
    family = "iq4" if mix.startswith("iq4") else mix
    rules = (weighed and RULES.get(f"{family} weighed")) or RULES.get(family, {})
    seen, found = Counter[str](), dict[str, str]()
    for name, shape in ((entry.name, entry.shape) for entry in entries):
        if math.prod(shape[:-1]) == 1 or not name.endswith("weight") or STAY.search(name):
            continue
        kind = kind_of(name)
        at = layer(name) if kind == "down" and experts > 1 else seen[kind]
        seen[kind] += 1
        count, own = layers if kind == "down" else counts[kind], default
        for condition, better in reversed(rules.get(kind, {}).items()):
            if heads >= 4 * shared if condition == "grouped" else HOLDS[condition](at, count):
                own = better
        if kind == "v" and is_70b and own in ("Q3_K", "Q4_K"):
            own = "Q5_K"
        if experts == 8 and kind in ("v", "k", "out"):
            own = "Q8_0" if kind != "out" else default if mix in PLAIN else "Q5_K"
        if kind == "head" or (kind == "tokens" and not counts["head"]):
            own = "Q8_0" if default == "Q8_0" or shape[-1] % TYPES[default][1] else "Q6_K"
        choices = (default if TYPES[default][1] == 1 else own, NARROW.get(own, "IQ4_NL"), "F16")
        found[name] = next(one for one in choices if shape[-1] % TYPES[one][1] == 0)
    return found


# of image models, as ComfyUI-GGUF's patch of llama.cpp has them (tools/lcpp.patch)
IMAGE_KINDS = {
    "v": r"attn_v\.weight|\.(?:to_)?v\.weight|\.attn\.w[12]v\.weight|_attn\.v_proj\.weight",
    "qkv": r"att(?:n|ention)[._]qkv\.weight",
    "down": r"experts\.(?:(?!experts\.).)*\.w2\.weight|\.ffn\.2\.weight|\.ff\.net\.2\.weight"
    r"|\.mlp\.layer2\.weight|\.adaln_modulation_mlp\.2\.weight|\.feed_forward\.w2\.weight",
}
IMAGE_RULES = {  # the type of the first so many of a kind, where there is a number, and of others
    "q2_k": {"v": "Q3_K"}, "q3_k_m": {"v": (2, "Q5_K", "Q4_K"), "qkv": "Q4_K", "down": "Q4_K"},
    "q3_k_l": {"v": "Q5_K", "qkv": "Q4_K", "down": "Q5_K"},
    "q4_k_s": {"v": (4, "Q5_K", "Q4_K"), "down": "Q5_K"},
    "q4_k_m": {"v": "Q6_K", "qkv": "Q5_K", "down": "Q6_K"},
    "q5_k_m": {"v": "Q6_K", "qkv": "Q6_K", "down": "Q6_K"},
    "q4_0": {"down": "Q4_1"}, "q5_0": {"down": "Q5_1"},
}  # fmt: skip
IMAGE_STAY = re.compile(  # numbered, and no blocks
    r"(?:^|\.)(?:txt_in|img_emb|caption_projection|label_emb|time_embed|(?:context|noise)_refiner"
    r"|txtfusion)\.|\.ff_i\.gate\.|input_blocks\.0\.0\.|^out\.|\.out\.2\."
)


def image_types_of(entries: Iterable[Entry], mix: str) -> dict[str, str]:
    """The types that a mix gives the matrices in blocks of an image model, by name."""
    default, number = MIXES[mix]
    mix = next(name for name in reversed(MIXES) if MIXES[name][1] == number)  # its whole name
    seen, found = Counter[str](), dict[str, str]()
    for name, shape in ((entry.name, entry.shape) for entry in entries):
        if IMAGE_STAY.search(name):
            continue
        kind = next((one for one, part in IMAGE_KINDS.items() if re.search(part, name)), "")
        rule = IMAGE_RULES.get(mix, {}).get(kind, default)
        own = rule if isinstance(rule, str) else rule[1 if seen[kind] < rule[0] else 2]
        seen[kind] += 1
        found[name] = "F16" if shape[-1] % TYPES[own][1] else own
    return found


def _number(header: GgufHeader, key: str) -> int:
    """A number in the architecture's metadata, or 0; the first if there is one per layer."""
    key = f"{header.architecture}.{key}"
    value = header.arrays.get(key, (header.metadata.get(key),))[0]
    return value if isinstance(value, int) else 0


def with_number(header: GgufHeader, number: int) -> GgufHeader:
    """The header with the number of a mix, if it stores one."""
    raw, (start, end) = bytearray(header.raw), header.spans.get(FILE_TYPE, (0, 0))
    if end - start == 8 + len(FILE_TYPE) + 8:  # a length, the key, a type and 32 bits
        struct.pack_into("<II", raw, end - 8, UINT32, number)
    return replace(header, raw=bytes(raw))

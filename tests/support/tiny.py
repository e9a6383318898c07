"""Tiny models of any type that transformers knows, by shrinking every size in its default
config."""

import torch
import transformers

AUTOS = (
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoModelForSpeechSeq2Seq",
    "AutoModelForSeq2SeqLM",
    "AutoModel",
)
LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "num_feat_extract_layers")


def shrink(config):
    """The config with few, small layers; per-layer lists cut to the first and the last."""
    lengths = {getattr(config, k) for k in LAYERS if isinstance(getattr(config, k, None), int)}
    for key, value in list(vars(config).items()):
        if isinstance(value, transformers.PretrainedConfig):
            shrink(value)
        elif isinstance(value, (list, tuple)) and len(value) in lengths and len(value) > 2:
            setattr(config, key, type(value)(value[:1]) + type(value)(value[-1:]))
        elif key in ("out_features", "_out_features"):
            setattr(config, key, None)
        elif type(value) is int and not key.startswith("_"):
            small = _small(key, value)
            if small is not None:
                setattr(config, key, small)
    _agree(config)
    return config


def _agree(config) -> None:
    """Settings that must fit the shrunk ones: indices of layers, heads of state spaces, sections of
    rotary embeddings."""
    settings, width = vars(config), getattr(config, "hidden_size", None)
    for key in ("out_indices", "_out_indices"):
        if settings.get(key):
            setattr(config, key, None)
    if isinstance(settings.get("attention_window"), int):
        config.attention_window = 4
    if "mamba_d_ssm" in settings:
        config.mamba_d_ssm = None
    for key, value in (
        ("head_dim", 16),
        ("vocab_size", 96),
        ("num_key_value_heads", 2),
        ("layer_types", ["full_attention"] * 2),
    ):
        if key in settings and settings[key] is None:
            setattr(config, key, value)
    for heads, size, expand in (
        ("num_heads", "head_dim", "expand"),
        ("mamba_n_heads", "mamba_d_head", "mamba_expand"),
    ):
        if (
            isinstance(width, int)
            and all(isinstance(getattr(config, k, None), int) for k in (heads, expand))
            and size in settings
        ):
            setattr(config, size, 16)
            setattr(config, heads, width * getattr(config, expand) // 16)
    rope = getattr(config, "rope_parameters", None)
    if (
        isinstance(rope, dict)
        and rope.get("mrope_section")
        and isinstance(getattr(config, "head_dim", None), int)
    ):
        rope["mrope_section"] = [2, 3, 3]


def _small(key: str, value: int) -> int | None:
    rules = [
        ("token_id" in key, min(value, 5)),
        ("vocab" in key, 96),
        ("kv_heads" in key or "key_value_heads" in key, 2),
        ("head_dim" in key or key == "d_head" or (key.endswith("_dim") and value > 64), 16),
        ("heads" in key or key == "n_head", 4),
        ("experts_per_tok" in key or "top_k" in key or "topk" in key, min(value, 2)),
        ("n_group" in key, 1),
        ("experts" in key and "shared" not in key, 4),
        ("layers" in key or key in ("depth", "n_layer", "num_blocks"), min(value, 2)),
        ("intermediate" in key or "ffn" in key or "inner" in key, 48),
        (key in ("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "hidden_dim"), 64),
        ("size" in key and value > 64 and "image" not in key and "patch" not in key, 64),
        ("rank" in key and value > 16, 16),
    ]
    return next((small for holds, small in rules if holds), None)


def model(kind: str, *, limit: int = 60_000_000):
    """A tiny random model of a model type, every float parameter and buffer random; None if it
    cannot be made small."""
    config = shrink(transformers.AutoConfig.for_model(kind))
    autos = [getattr(transformers, name) for name in AUTOS]
    cls = next((a for a in autos if type(config) in a._model_mapping), None)
    if cls is None:
        return None
    with torch.device("meta"):
        if sum(p.numel() for p in cls.from_config(config).parameters()) > limit:
            return None
    torch.manual_seed(0)
    result = cls.from_config(config)
    with torch.no_grad():
        for tensor in [*result.parameters(), *result.buffers()]:
            if tensor.is_floating_point():
                tensor.normal_(std=0.05)
    return result

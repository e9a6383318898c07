"""Decoders whose parameters follow from a few settings of the config, so that completeness can be
checked without building the model.

A test of each (test_decoders) compares them with transformers' own. A checkpoint that differs in
anything is left to the model's code (`core/weights/loading.py`), which also reports the problem."""

from collections.abc import Iterator
from dataclasses import dataclass

from adapterkit.core.checkpoint.spec import Checkpoint
from adapterkit.core.records import Json

Shape = tuple[int, ...]
SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads",
)  # fmt: skip
ROPES = {"default", "linear", "dynamic", "yarn", "longrope", "llama3"}


@dataclass(frozen=True)
class Decoder:
    """A causal model of layers like Llama's: its class, and its deviations."""

    name: str
    biases: tuple[tuple[str, str], ...] = ()  # (setting, projections with a bias if it is set)
    always: str = ""  # projections that always have a bias
    has_norms: bool = False  # of queries and keys


DECODERS = {
    "llama": Decoder(
        "LlamaForCausalLM", (("attention_bias", "q k v o"), ("mlp_bias", "gate up down"))
    ),
    "mistral": Decoder("MistralForCausalLM"),
    "qwen2": Decoder("Qwen2ForCausalLM", always="q k v"),
    "qwen3": Decoder("Qwen3ForCausalLM", (("attention_bias", "q k v o"),), has_norms=True),
}


def whole_decoder(base: Checkpoint) -> str | None:
    """The class of a model whose parameters are all stored, in their shapes; None for others, and
    if only the model's code can decide."""
    config = base.config
    decoder = DECODERS.get(str(config.get("model_type")))
    if decoder is None or config.get("architectures") != [decoder.name] or not _is_usual(config):
        return None
    from adapterkit.core.weights.names import plain_names

    found = {key: spec.shape for key, spec in base.tensors.items()}
    is_whole = all(found.get(name) == shape for name, shape in _parameters(decoder, config))
    return decoder.name if is_whole and plain_names(config) else None


def _is_usual(config: Json) -> bool:
    """True if the settings that shape the model are present and valid for transformers."""
    sizes = [config.get(name) for name in SIZES]
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else None
    return (
        all(type(size) is int and size > 0 for size in sizes)
        and config["hidden_size"] % config["num_attention_heads"] == 0
        and type(config.get("head_dim", 1)) is int
        and config.get("hidden_act") == "silu"
        and kind in ROPES
    )


def _parameters(decoder: Decoder, config: Json) -> Iterator[tuple[str, Shape]]:
    """Yield names and shapes."""
    vocabulary, hidden, inner, layers, heads, groups = (config[name] for name in SIZES)
    head = config.get("head_dim", 128 if decoder.has_norms else hidden // heads)
    projections = {
        "q": ("self_attn", heads * head, hidden),
        "k": ("self_attn", groups * head, hidden),
        "v": ("self_attn", groups * head, hidden),
        "o": ("self_attn", hidden, heads * head),
        "gate": ("mlp", inner, hidden),
        "up": ("mlp", inner, hidden),
        "down": ("mlp", hidden, inner),
    }
    biased = " ".join([decoder.always, *(its for flag, its in decoder.biases if config.get(flag))])
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    yield "model.norm.weight", (hidden,)
    if config.get("tie_word_embeddings") is not True:
        yield "lm_head.weight", (vocabulary, hidden)
    for number in range(layers):
        layer = f"model.layers.{number}"
        yield f"{layer}.input_layernorm.weight", (hidden,)
        yield f"{layer}.post_attention_layernorm.weight", (hidden,)
        for name in ("q", "k") if decoder.has_norms else ():
            yield f"{layer}.self_attn.{name}_norm.weight", (head,)
        for name, (module, rows, columns) in projections.items():
            yield f"{layer}.{module}.{name}_proj.weight", (rows, columns)
            if name in biased.split():
                yield f"{layer}.{module}.{name}_proj.bias", (rows,)

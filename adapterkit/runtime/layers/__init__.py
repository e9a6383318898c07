"""The kinds of layers that take factors, by name; each is one file."""

from adapterkit.adapters.lora_config import LoraConfig
from adapterkit.errors import Refused
from adapterkit.runtime.layers.attention import OUTPUT, AttentionOutputPart, AttentionPart
from adapterkit.runtime.layers.conv import ConvPart
from adapterkit.runtime.layers.embedding import EmbeddingPart
from adapterkit.runtime.layers.invoked import InvokedConv1DPart, InvokedPart
from adapterkit.runtime.layers.linear import Conv1DPart, LinearPart
from adapterkit.runtime.parts.factors import FactorsPart

KINDS: dict[str, type[FactorsPart]] = {
    "linear": LinearPart,
    "conv1d": Conv1DPart,
    "embedding": EmbeddingPart,
    "conv": ConvPart,
    "attention": AttentionPart,
    "attention_output": AttentionOutputPart,
}


def members(path: str, kind: str) -> list[tuple[str, str]]:
    """The modules, with their kinds, that have factors where `path` is a target."""
    if kind == "attention":
        return [(path, kind), (f"{path}.{OUTPUT}", "attention_output")]
    return [(path, kind)]


def part_class(kind: str, config: LoraConfig) -> type[FactorsPart]:
    """The class of an adapter's parts on layers of a kind; `Refused` where an aLoRA cannot act."""
    if not config.invocation_tokens:
        return KINDS[kind]
    if not issubclass(KINDS[kind], LinearPart):
        raise Refused(
            f"an activated LoRA cannot act on {kind} layers",
            expected="linear layers",
            where="targets",
            hint="exclude them from targets",
        )
    return InvokedConv1DPart if kind == "conv1d" else InvokedPart

"""What an init has written, and the models on which it is tried."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
import transformers
from torch import Tensor, nn

from adapterkit.core.registry import members
from tests.support import architectures, experts, oracle, tiny


@dataclass(frozen=True)
class Kind:
    """A model, and targets among its layers."""

    build: Callable[[], nn.Module]
    targets: str
    modules: int
    linear: bool = True  # whether all targets are matrices


def _resnet() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 1], "num_labels": 3}
    config = transformers.ResNetConfig(**sizes, layer_type="bottleneck")
    return transformers.ResNetForImageClassification(config).eval()


def _videomae() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"image_size": 8, "patch_size": 4, "num_frames": 4, "hidden_size": 16}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return transformers.VideoMAEForVideoClassification(transformers.VideoMAEConfig(**sizes)).eval()


def _experts(kind: str, count: int) -> Kind:
    """Stacks of experts, and linear layers beside them; PEFT passes DeepSeek's shared ones by."""
    targets = rf"(?!.*shared_experts).*({'|'.join(experts.parameters_of(kind))}|q_proj)"
    return Kind(lambda: experts.tiny(kind), targets, count)


KINDS = {
    "linear": Kind(oracle.llama, ".*_proj", 14),
    "embedding": Kind(oracle.llama, "embed_tokens,lm_head", 2),
    "tied": Kind(oracle.tied_llama, "embed_tokens,q_proj", 3),
    "tied-head": Kind(oracle.tied_llama, "lm_head", 1),
    "transposed": Kind(oracle.gpt2, "c_attn,c_proj,c_fc", 8),
    "conv1d": Kind(
        architectures.BUILDS["wav2vec2"], r".*(layers\.\d\.conv|q_proj)", 4, linear=False
    ),
    "conv2d": Kind(_resnet, "convolution", 9, linear=False),  # kernels of 7, 3 and 1
    "conv3d": Kind(_videomae, "projection", 1, linear=False),
    "subclass": Kind(lambda: tiny.model("falcon"), "query_key_value,dense", 4),
    "fused": Kind(lambda: tiny.model("phi3"), "qkv_proj,gate_up_proj", 4),
    "stored-fused": Kind(lambda: tiny.model("nomic_bert"), ".*[qk]_proj", 4),
    "mixtral": _experts("mixtral", 6),
    "qwen3_moe": _experts("qwen3_moe", 6),
    "gpt_oss": _experts("gpt_oss", 6),  # stacks of transposed matrices
    "llama4_text": _experts("llama4_text", 8),  # and a shared expert
    "deepseek_v3": _experts("deepseek_v3", 6),
    "jetmoe": _experts("jetmoe", 2),  # stacks of a parameter `weight`
}


def methods(**constants: object) -> list[str]:
    """The inits with these constants."""
    return [
        name
        for name, init in members("inits").items()
        if all(getattr(init, key) == value for key, value in constants.items())
    ]


def needs_statistics(method: str) -> bool:
    return bool(set(members("inits")[method].needs) - {"weight"})


def fits(method: str, kind: Kind) -> bool:
    """Whether a method is defined on all targets of a kind, and needs no statistics of them."""
    needs_matrices = "conv" not in members("inits")[method].kinds
    return not needs_statistics(method) and (kind.linear or not needs_matrices)


def base_of(out: Path, base: Path) -> Path:
    """The base on which an initialized adapter is loaded."""
    return out / "base" if (out / "base").exists() else base


def load(cls: type, folder: Path, adapter: Path | None = None) -> nn.Module:
    """A model in float32, with an adapter by PEFT."""
    with oracle.quiet():
        model = cls.from_pretrained(folder, dtype=torch.float32)
        return model if adapter is None else peft.PeftModel.from_pretrained(model, adapter)


def rebuilt(cls: type, base: Path, adapter: Path) -> dict[str, Tensor]:
    """All weights of a base with an adapter merged by PEFT, in float32."""
    with oracle.quiet():
        return load(cls, base, adapter).merge_and_unload().state_dict()


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], bound: float) -> None:
    """Each tensor within the bound, relative to its norm."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        error = float((actual[name].double() - value.double()).norm())
        assert error <= bound * float(value.double().norm()), name


def products(folder: Path) -> dict[str, Tensor]:
    """b @ a of the linear layers of an adapter's file, in float64."""
    actual = {}
    tensors = oracle.stored(folder)
    for key, a in tensors.items():
        if key.endswith(".lora_A.weight"):
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            actual[name] = tensors[key.replace("lora_A", "lora_B")].double() @ a.double()
    return actual

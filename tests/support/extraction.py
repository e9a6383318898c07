"""What the suites of extract share: fine-tunes made by a change, and the ways back from an
adapter."""

import json
import warnings
from pathlib import Path

import peft
import torch
import transformers

import adapterkit
from tests.support import oracle

BUILDS = {
    "llama": oracle.llama,
    "gpt2": oracle.gpt2,
    "bert": oracle.bert,
    "vit": oracle.vit,
    "t5": oracle.t5,
    "neox": oracle.neox,
}
MODEL = "adapter_model.safetensors"
NOT_LINEAR = ("embed", "wte", "wpe", "shared", "relative", "lm_head", "patch", "token")


def tuned(base: Path, build, out: Path, change, **saving) -> Path:
    """A copy of the base whose parameters went through `change(name, tensor)`."""
    model = oracle.load(build, base)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(change(name, parameter.detach().clone()))
    with oracle.quiet():
        model.save_pretrained(out, **saving)
    return out


def low_rank(rank: int, where=lambda name, t: t.dim() == 2 and "embed" not in name):
    """A change of that rank on every matrix that is no embedding."""
    generator = torch.Generator().manual_seed(7)

    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if not where(name, tensor):
            return tensor
        left, right = (
            torch.randn(*shape, generator=generator)
            for shape in ((tensor.shape[0], rank), (rank, tensor[0].numel()))
        )
        return tensor + 0.05 * (left @ right).view_as(tensor).to(tensor.dtype)

    return change


def config_of(folder: Path) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


def linear(name: str, tensor: torch.Tensor) -> bool:
    return tensor.dim() >= 2 and not any(
        word in name
        for word in ("embed", "wte", "wpe", "shared", "relative", "lm_head", "patch", "token")
    )


SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
}
FOUR = {"num_local_experts": 4}
MOES = {
    "mixtral": FOUR,
    "qwen2_moe": {
        "num_experts": 4,
        "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 40,
    },  # with a shared expert
    "qwen3_moe": {
        "num_experts": 4,
        "moe_intermediate_size": 48,
        "mlp_only_layers": [0],
    },  # with a dense layer
    "gpt_oss": FOUR,  # stored transposed, with biases of experts and routers
    "llama4_text": FOUR
    | {
        "moe_layers": [1],
        "intermediate_size_mlp": 40,
    },  # stored transposed, dense layers, a shared expert
    "jetmoe": FOUR | {"kv_channels": 16},  # one stack a module
}


def mixture(kind: str, **sizes):
    """A tiny mixture of experts."""
    config = transformers.AutoConfig.for_model(kind, **(SIZES | MOES[kind] | sizes))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.normal_(std=0.05)
    return model


def moved(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A change of full rank of all that is a matrix or a stack of some, and of the routers'
    biases."""
    if (tensor.dim() < 2 and "router.bias" not in name) or "embed" in name:
        return tensor
    generator = torch.Generator().manual_seed(len(name) + tensor.numel())
    return tensor + 0.05 * torch.randn(tensor.shape, generator=generator)


def check_both_ways(base: Path, adapter: Path, after: Path, build, tmp_path: Path) -> None:
    """merge and PEFT both make the fine-tune of the base and the adapter."""
    adapterkit.merge(base, [adapter], out=tmp_path / "back", overwrite=True)
    check_state(oracle.load(build, tmp_path / "back").state_dict(), after, build)
    check_peft(base, adapter, after, build)


def check_peft(base: Path, adapter: Path, after: Path, build) -> None:
    with oracle.quiet():
        warnings.filterwarnings("error", message=".*missing adapter keys")
        actual = (
            peft.PeftModel.from_pretrained(oracle.load(build, base), adapter)
            .merge_and_unload()
            .state_dict()
        )
    check_state(actual, after, build)


def check_state(actual: dict[str, torch.Tensor], after: Path, build) -> None:
    expected = oracle.load(build, after).state_dict()
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.allclose(actual[key], tensor, atol=3e-6), key


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(10)[None]).logits


def everything(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A change of full rank of every parameter."""
    generator = torch.Generator().manual_seed(len(name) + tensor.numel())
    return tensor + 0.1 * torch.randn(tensor.shape, generator=generator)

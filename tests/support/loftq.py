"""What the suites of LoftQ share: the models, and what their folders hold in float64."""

from collections.abc import Callable
from pathlib import Path

import peft
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from adapterkit.core.checkpoint.spec import open_checkpoint
from adapterkit.core.inputs.sources import open_source
from adapterkit.core.weights.decoded import decoded_view, quantized_weights
from tests.support import oracle

SIZES = {"hidden_size": 128, "intermediate_size": 192}  # rows of whole blocks


def gpt2() -> nn.Module:
    return oracle._model(
        "GPT2LMHeadModel",
        transformers.GPT2Config(vocab_size=80, n_embd=64, n_layer=1, n_head=4, n_positions=64),
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: oracle.llama(num_hidden_layers=1, **SIZES),
    "gpt2": gpt2,
    "bert": oracle.bert,  # rows of half a block
}


def originals(folder: Path) -> dict[str, Tensor]:
    return {key: tensor.double() for key, tensor in load_file(folder / "model.safetensors").items()}


def values(folder: Path) -> dict[str, Tensor]:
    """Every quantized weight of a folder, decoded."""
    tensors = load_file(folder / "model.safetensors")
    specs = quantized_weights(decoded_view(open_checkpoint(open_source(str(folder)))).tensors)
    return {
        spec.key: spec.decode({part.key: tensors[part.key] for part in spec.parts}).double()
        for spec in specs
    }


def products(name: str, adapter: Path) -> dict[str, Tensor]:
    """scale·b@a of every weight, the scale being PEFT's."""
    model = oracle.peft_model(MODELS[name]().float(), adapter)
    actual = {}
    for path, module in model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            key = path.removeprefix("base_model.model.") + ".weight"
            b, a = (getattr(module, f"lora_{side}")["a0"].weight.detach().double() for side in "BA")
            delta = module.scaling["a0"] * b @ a
            actual[key] = delta.T if module.fan_in_fan_out else delta
    return actual

"""What walks a model for training finds the adapters' values in the groups in which it finds
PEFT's."""

import re
from collections.abc import Callable, Iterable

import peft
import pytest
import torch
from torch import nn

from adapterkit.runtime import load
from tests.support.beside_peft import JUNK, parameters_of
from tests.support.live import llama, tokens

X = tokens(2, 6)
Groups = dict[object, list[torch.Tensor]]
NORMS = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]


class Small(nn.Module):
    """Each kind of layer whose copies and biases training code tells apart."""

    def __init__(self):
        super().__init__()
        self.word = nn.Embedding(20, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.norm, self.final = nn.LayerNorm(8), nn.RMSNorm(8)
        self.conv, self.batch = nn.Conv1d(8, 8, 1), nn.BatchNorm1d(8)
        self.block = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
        self.head = nn.Linear(8, 4)

    def forward(self, ids):
        x = self.word(ids)
        for layer in self.layers:
            x = layer(x)
        x = self.batch(self.conv(self.final(self.norm(x)).mT)).mT
        return self.head(self.block(x))


def small() -> nn.Module:
    torch.manual_seed(0)
    return Small()


LAYERS = ["layers.0", "layers.1"]
KINDS = {
    "factors": (llama, {"target_modules": ["q_proj", "down_proj"]}),
    "magnitudes": (small, {"target_modules": [*LAYERS, "conv"], "use_dora": True}),
    "biases of factors": (small, {"target_modules": LAYERS, "lora_bias": True}),
    "embedding": (small, {"target_modules": ["word", "layers.0"]}),
    "trained biases": (small, {"target_modules": LAYERS, "bias": "all"}),
    "copies": (
        small,
        {"target_modules": ["layers.0"], "modules_to_save": ["head", "norm", "final", "batch"]},
    ),
    "copy of a block": (small, {"target_modules": ["head"], "modules_to_save": ["block"]}),
    "rows": (
        llama,
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [1, 3]}},
    ),
}


def by_get_parameter_names(model: nn.Module) -> Groups:
    from transformers.trainer_pt_utils import get_parameter_names

    decayed = set(get_parameter_names(model, [nn.LayerNorm], NORMS))
    return grouped(model.named_parameters(), lambda name, p: name in decayed)


def by_trainer(model: nn.Module) -> Groups:
    from transformers import Trainer

    decayed = set(Trainer.get_decay_parameter_names(None, model))
    return grouped(model.named_parameters(), lambda name, p: name in decayed)


def by_layer(model: nn.Module) -> Groups:
    """Rates of layers."""
    return grouped(model.named_parameters(), lambda name, p: re.findall(r"layers\.(\d+)", name)[:1])


def by_shape(model: nn.Module) -> Groups:
    """As timm has it."""
    return grouped(model.named_parameters(), lambda name, p: p.ndim <= 1 or name.endswith(".bias"))


def by_words(model: nn.Module) -> Groups:
    """As the examples of transformers and DeepSpeed."""
    words = ("bias", "LayerNorm.weight")
    return grouped(model.named_parameters(), lambda name, p: any(w in name for w in words))


def by_ending(model: nn.Module) -> Groups:
    return grouped(model.named_parameters(), lambda name, p: name.endswith(".bias"))


def by_class(model: nn.Module) -> Groups:
    """What is in norms, and the rest."""
    norms, groups = (nn.LayerNorm, nn.RMSNorm, nn.BatchNorm1d), {True: [], False: []}

    def walk(module: nn.Module, inside: bool) -> None:
        inside = inside or isinstance(module, norms)
        groups[inside] += module.parameters(recurse=False)
        for _, child in module.named_children():
            walk(child, inside)

    walk(model, False)
    return groups


def by_children(model: nn.Module) -> Groups:
    def walk(module: nn.Module) -> Iterable[torch.Tensor]:
        yield from module._parameters.values()
        for child in module.children():
            yield from walk(child)

    return {"all": list(walk(model))}


def by_named_children(model: nn.Module) -> Groups:
    def walk(module: nn.Module) -> Iterable[torch.Tensor]:
        yield from module.parameters(recurse=False)
        for _, child in module.named_children():
            yield from walk(child)

    return {"all": list(walk(model))}


def by_named_modules(model: nn.Module) -> Groups:
    return {"all": [p for _, m in model.named_modules() for p in m.parameters(recurse=False)]}


def by_apply(model: nn.Module) -> Groups:
    found: list[torch.Tensor] = []
    model.apply(lambda module: found.extend(module.parameters(recurse=False)))
    return {"all": found}


WALKERS = (
    by_get_parameter_names,
    by_trainer,
    by_layer,
    by_shape,
    by_words,
    by_ending,
    by_class,
    by_children,
    by_named_children,
    by_named_modules,
    by_apply,
)


def grouped(named: Iterable[tuple], key: Callable[..., object]) -> Groups:
    groups: Groups = {}
    for name, parameter in named:
        groups.setdefault(str(key(name, parameter)), []).append(parameter)
    return groups


def keys(groups: Groups, values: dict[str, torch.Tensor]) -> dict[object, set[str]]:
    """The trained values in each group, by their keys in a file."""
    names = {id(value): key for key, value in values.items() if value.requires_grad}
    found = {group: {names.get(id(p)) for p in own} - {None} for group, own in groups.items()}
    return {group: own for group, own in found.items() if own}


NAMED = [(kind, "default") for kind in KINDS]
NAMED += [(kind, "my_bias") for kind in ("factors", "copies", "rows")]


# PEFT takes 1-D biases of factors for shards
@pytest.mark.filterwarnings("ignore:Adapter 'default'. 2 LoRA tensor.s. have invalid shape")
@pytest.mark.parametrize(("kind", "name"), NAMED)
def test_a_walker_groups_values_as_it_groups_pefts(kind, name, tmp_path):
    make, settings = KINDS[kind]
    theirs = peft.get_peft_model(make(), peft.LoraConfig(r=2, **settings), adapter_name=name)
    theirs.save_pretrained(tmp_path)
    folder = tmp_path if name == "default" else tmp_path / name
    adapters = load(model := make(), folder, name=name, trainable=True)
    expected = theirs.state_dict(keep_vars=True)
    expected = peft.get_peft_model_state_dict(theirs, state_dict=expected, adapter_name=name)
    expected = {key: value for key, value in expected.items() if not JUNK.search(key)}
    own = parameters_of(adapters, name)
    for walk in WALKERS:
        found = keys(walk(model), own)
        assert found and found == keys(walk(theirs), expected), walk.__name__


def test_a_map_of_devices_from_sizes_as_pefts_runs(tmp_path):
    """accelerate's sizes and maps count the adapters; what it offloads is the base alone."""
    import accelerate
    from accelerate.utils import compute_module_sizes

    settings = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(r=2, **settings))
    theirs.save_pretrained(tmp_path / "adapter")
    adapters = load(model := llama(), tmp_path / "adapter", trainable=True)
    expected, path = model(X).logits, "model.layers.0.self_attn.q_proj"
    sizes = compute_module_sizes(model), compute_module_sizes(theirs.base_model.model)
    assert sizes[0][path] == sizes[1][path]
    places = accelerate.infer_auto_device_map(model, {"cpu": sizes[0][""] // 3})
    assert {*places.values()} == {"cpu", "disk"}
    accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path / "disk")
    assert torch.equal(model(X).logits, expected)
    model(input_ids=X, labels=X).loss.backward()
    assert all(parameter.grad is not None for parameter in adapters.parameters())

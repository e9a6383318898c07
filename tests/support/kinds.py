"""A net, an adapter of each kind on it, and their deltas as PEFT merges them."""

import warnings
from dataclasses import dataclass, field

import peft
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from adapterkit import resize

CONFIGS = {
    "adalora": peft.AdaLoraConfig, "dora": peft.LoraConfig, "gralora": peft.GraloraConfig,
    "loha": peft.LoHaConfig, "lokr": peft.LoKrConfig, "oft": peft.OFTConfig,
    "vera": peft.VeraConfig, "boft": peft.BOFTConfig, "hira": peft.HiraConfig,
    "hra": peft.HRAConfig, "ia3": peft.IA3Config, "miss": peft.MissConfig,
}  # fmt: skip
FULL = 10_000  # a rank above all


class Net(nn.Module):
    """Sizes that hurt: square, tall, wide, three elements, a prime, kernels of several shapes."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(30, 12)
        self.fit = nn.Linear(12, 12)
        self.tall = nn.Linear(6, 35)
        self.wide = nn.Linear(36, 8, bias=False)
        self.tiny = nn.Linear(3, 1)
        self.prime = nn.Linear(13, 7)
        self.deep = nn.Sequential(nn.Linear(16, 20), nn.Linear(20, 4))
        self.image = nn.Conv2d(6, 10, 3)
        self.strip = nn.Conv2d(4, 6, (3, 1))
        self.point = nn.Conv2d(6, 10, 1)
        self.line = nn.Conv1d(4, 6, 3)
        self.head = nn.Linear(5, 2)


LINEAR = ["fit", "tall", "wide", "tiny", "prime", "deep.0", "deep.1"]


@dataclass(frozen=True)
class Case:
    kind: str
    targets: list[str]
    options: dict = field(default_factory=dict)
    base: bool = False
    pruned: dict | None = None  # AdaLoRA's rank_pattern

    def __str__(self):
        options = "-".join(f"{key}={value}" for key, value in self.options.items())
        rest = "-base" * self.base + "-pruned" * bool(self.pruned)
        return f"{self.kind}-{options}-{'+'.join(self.targets)}{rest}"


PRUNED = {
    "fit.lora_E": [True, False, True, True], "tall.lora_E": [False] * 4, "wide.lora_E": [True] * 4,
    "prime.lora_E": [False, False, True, False],
}  # fmt: skip
OFT = {"oft_block_size": 2, "use_cayley_neumann": False}
CASES = [
    Case("adalora", LINEAR, {"init_r": 4, "lora_alpha": 3}),
    Case("adalora", LINEAR, {"init_r": 1, "lora_alpha": 0}, base=True),
    Case("adalora", ["image", "point", "wide"], {"init_r": 5, "lora_alpha": 7}, base=True),
    Case(
        "adalora", ["fit", "tall", "wide", "prime"], {"init_r": 4, "lora_alpha": 3}, pruned=PRUNED
    ),
    Case(
        "adalora",
        ["fit", "wide", "prime"],
        {"init_r": 4, "lora_alpha": 0},
        pruned={k: PRUNED[k] for k in PRUNED if "tall" not in k},
    ),
    Case("dora", [*LINEAR, "tokens"], {"r": 2, "lora_alpha": 5}, base=True),
    Case("dora", ["image", "point", "line", "fit"], {"r": 3, "use_rslora": True}, base=True),
    Case("gralora", ["fit", "wide", "deep.0"], {"r": 6, "alpha": 5}),
    Case("gralora", ["fit", "wide", "deep.0"], {"r": 4, "gralora_k": 4, "hybrid_r": 3}, base=True),
    Case("gralora", LINEAR, {"r": 1, "gralora_k": 1, "alpha": -2, "hybrid_r": 2}),
    Case("loha", LINEAR, {"r": 1, "alpha": 3}),
    Case("loha", LINEAR, {"r": 3, "alpha": 2}),
    Case(
        "loha",
        LINEAR,
        {
            "r": 2,
            "alpha": 8,
            "rank_pattern": {"wide": 5, "deep.0": 3},
            "alpha_pattern": {"^fit": 1},
        },
        base=True,
    ),
    Case("loha", ["image", "line", "point", "fit"], {"r": 2}, base=True),
    Case("loha", ["image", "fit"], {"r": 2, "use_effective_conv2d": True}),
    Case(
        "loha", ["image", "strip", "line", "fit"], {"r": 3, "use_effective_conv2d": True}, base=True
    ),
    Case("lokr", LINEAR, {"r": 1, "alpha": 3}),
    Case("lokr", LINEAR, {"r": 50, "alpha": 4}),
    Case("lokr", LINEAR, {"r": 1, "alpha": -2, "decompose_both": True}),
    Case(
        "lokr",
        LINEAR,
        {"r": 2, "decompose_factor": 2, "rank_pattern": {"tall": 1}, "alpha_pattern": {"tall": 5}},
        base=True,
    ),
    Case("lokr", ["image", "point", "fit"], {"r": 50}),
    Case("lokr", ["image", "strip", "line", "fit"], {"r": 1}, base=True),
    Case("lokr", ["image"], {"r": 1, "use_effective_conv2d": True}),
    Case("oft", [*LINEAR[:3], "deep.0"], OFT, base=True),
    Case(
        "oft",
        ["fit", "wide", "tokens", "tall", "point"],
        {"oft_block_size": 3, "block_share": True, "use_cayley_neumann": False},
        base=True,
    ),
    Case("oft", ["fit", "tokens"], {"oft_block_size": 4, "num_cayley_neumann_terms": 5}, base=True),
    Case(
        "oft", ["wide", "fit"], {"r": 3, "oft_block_size": 0, "coft": True, "eps": 0.7}, base=True
    ),
    Case("vera", LINEAR, {"r": 4}, base=True),
    Case("vera", ["fit", "deep.1"], {"r": 40}, base=True),
    Case("boft", [*LINEAR[:3], "deep.0"], {"boft_block_size": 2}, base=True),
    Case("boft", ["image", "fit"], {"boft_block_size": 0, "boft_block_num": 3}, base=True),
    Case("hira", [*LINEAR, "tokens"], {"r": 3}, base=True),
    Case("hira", ["image", "line", "point"], {"r": 2}, base=True),
    Case("hra", LINEAR, {"r": 2}, base=True),
    Case("hra", ["image", "point", "fit"], {"r": 5, "apply_GS": True}, base=True),
    Case("ia3", ["wide", "fit", "image"], {"feedforward_modules": ["fit", "image"]}, base=True),
    Case("miss", [*LINEAR[:3], "prime"], {"r": 5}, base=True),
    Case("miss", ["fit", "tall"], {"r": 4, "mini_r": 1, "init_weights": "mini"}, base=True),
    Case("miss", ["fit", "wide", "deep.0"], {"r": 4, "init_weights": "bat"}, base=True),
]


def net(base):
    model = Net()
    model.load_state_dict(load_file(base / "model.safetensors"))
    return model


def trained(case, base, folder, **more):
    """The case's adapter, all its parameters random, saved by PEFT."""
    extra = {"adalora": {"total_step": 10}, "dora": {"use_dora": True}}.get(case.kind, {})
    config = CONFIGS[case.kind](
        target_modules=list(case.targets),
        **(extra | case.options | {"modules_to_save": ["head"]} | more),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # BOFT's, of a CUDA kernel
        model = peft.get_peft_model(net(base), config)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "original_module" not in name:
            nn.init.normal_(parameter, std=0.5)
    if case.pruned:
        model.peft_config["default"].rank_pattern = dict(case.pruned)
    model.save_pretrained(folder)
    return folder


def deltas(base, folder):
    """Merged weight minus base of every module that PEFT adapts, float64."""
    model = peft.PeftModel.from_pretrained(net(base), folder).double()
    actual = {}
    for name, layer in model.base_model.model.named_modules():
        if hasattr(layer, "merge") and hasattr(layer, "base_layer"):
            before = layer.base_layer.weight.data.clone()
            with torch.no_grad():
                layer.merge()
            actual[name] = layer.base_layer.weight.data - before
    return actual


def flat(name, delta):
    return delta.T if name == "tokens" else delta.reshape(len(delta), -1)


def resized(case, base, adapter, out, **how):
    return resize(adapter, out=out, base=base if case.base else None, **how).data["parameters"]


def rewritten(folder, change):
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


SIMPLE = {
    "adalora": Case("adalora", ["fit", "tall"], {"init_r": 3}),
    "gralora": Case("gralora", ["fit", "tall"], {"r": 2, "gralora_k": 1}),
    "loha": Case("loha", ["fit", "tall"], {"r": 2}),
    "lokr": Case("lokr", ["fit", "tall"], {"r": 1}),
    "oft": Case("oft", ["fit", "tall"], {"oft_block_size": 3}, base=True),
    "vera": Case("vera", ["fit", "tall"], {"r": 3}, base=True),
    "boft": Case("boft", ["fit", "tall"], {"boft_block_size": 3}, base=True),
    "hira": Case("hira", ["fit", "tall"], {"r": 2}, base=True),
    "hra": Case("hra", ["fit", "tall"], {"r": 2}, base=True),
    "ia3": Case("ia3", ["fit", "tall"], {"feedforward_modules": ["fit", "tall"]}, base=True),
    "miss": Case("miss", ["fit", "tall"], {"r": 3}, base=True),
}

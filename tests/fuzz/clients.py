"""Random adapters of other tools' own writers, converted, and read by other tools' own readers: the
weights that both compute with are the same.

LyCORIS' modules write and say what they mean by their forward; LyCORIS, PEFT and diffusers read. A
LoRA of PEFT is read by mlx-lm, and one that mlx-lm holds by PEFT.
"""

import copy
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import peft
import torch
from diffusers import FluxTransformer2DModel
from lycoris.modules import get_module, make_module
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import adapterkit
from adapterkit.adapters.formats.modules.names import names_of
from adapterkit.core.errors import AdapterkitError
from tests.formats.golden.make_lycoris import tiny_unet
from tests.support import mlx_models

TOLERANCE = 2e-5  # of what the adapter changes, in float32
FULL = 999
KINDS = {"locon": LoConModule, "loha": LohaModule, "lokr": LokrModule}


@dataclass
class Outcome:
    """What came of one adapter."""

    settings: str
    compared: int = 0
    refused: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Base:
    """A tiny model, and the modules of a file in the names of its first publication or its own."""

    model: Any
    folder: Path
    architecture: str
    component: str
    groups: dict[str, list[str]]  # file's name -> modules of the model, in the order of the rows


def flux() -> nn.Module:
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=8, pooled_projection_dim=8,
        axes_dims_rope=(2, 2, 4),
    ).eval()  # fmt: skip


MODELS: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "flux": (flux, "transformer", "original"),  # fused linear layers
    "sd15": (tiny_unet, "unet", "model"),  # convolutions
}


@cache
def base_of(architecture: str, home: Path) -> Base:
    make, component, naming = MODELS[architecture]
    model, folder = make(), home / architecture
    model.save_pretrained(folder)
    names = names_of(architecture, component, naming, "underscores")
    groups: dict[str, dict[int, str]] = {}
    for name, module in model.named_modules():
        found = names.named(name) if isinstance(module, nn.Linear | nn.Conv2d) else None
        if found is not None and not found[0].rule.steps:
            groups.setdefault(found[1], {})[found[0].part] = name
    ordered = {text: [own[part] for part in sorted(own)] for text, own in groups.items()}
    return Base(model, folder, architecture, component, ordered)


def layer_of(base: Base, modules: list[str]) -> Any:
    """One layer with the weights of all of them, without a bias; of a convolution without padding,
    so that one position sees the whole kernel."""
    weight = torch.cat([base.model.get_submodule(name).weight.detach() for name in modules])
    out, inputs, *kernel = weight.shape
    size: Any = tuple(kernel)
    layer = (
        nn.Conv2d(inputs, out, size, bias=False) if kernel else nn.Linear(inputs, out, bias=False)
    )
    layer.weight.data = weight.clone()
    return layer


@torch.no_grad()
def weight_of(module: Any, shape: torch.Size) -> Tensor:
    """The weight that a layer's forward multiplies by."""
    size = shape[1:].numel()
    return module(torch.eye(size).reshape(size, *shape[1:])).reshape(size, -1).T.reshape(shape)


def randomized(module: Any) -> Any:
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name == "dora_scale":
                parameter.copy_(torch.rand_like(parameter) + 0.5)
            else:
                parameter.copy_(0.5 * torch.randn_like(parameter))
    return module.eval()


def lycoris_file(base: Base, draw: random.Random, path: Path) -> tuple[dict[str, Any], dict]:
    """A file of LyCORIS' own modules; the settings, and the weight that each group has with it."""
    kind = draw.choice(list(KINDS))
    options: dict[str, Any] = {
        "use_tucker": draw.random() < 0.3, "use_scalar": draw.random() < 0.3,
        "rs_lora": draw.random() < 0.3, "weight_decompose": draw.random() < 0.5,
        "wd_on_out": draw.random() < 0.5,
    }  # fmt: skip
    if kind == "lokr":  # whose readers, LyCORIS' own too, take 1 for a scale of whole matrices
        options |= {
            "rs_lora": False,
            "factor": draw.choice([-1, 2, 4]), "decompose_both": draw.random() < 0.5,
            "full_matrix": draw.random() < 0.2,
        }  # fmt: skip
    if options["weight_decompose"] and options["use_tucker"]:
        options["use_tucker"] = False  # its own reader takes one of them
    chosen = draw.sample(sorted(base.groups), min(len(base.groups), draw.randint(1, 4)))
    tensors, weights = {}, {}
    for name in chosen:
        layer = layer_of(base, base.groups[name])
        rank, alpha = draw.randint(1, 4), draw.choice([1.0, 2.0, 3.0, 0.5])
        module = randomized(KINDS[kind](f"lora_unet_{name}", layer, 1.0, rank, alpha, **options))
        for key, value in module.custom_state_dict().items():
            tensors[f"lora_unet_{name}.{key}"] = value.detach().clone().contiguous()
        weights[name] = weight_of(module, layer.weight.shape)
    save_file(tensors, path)
    return {"kind": kind, **options, "modules": chosen}, weights


def by_lycoris(base: Base, out: Path, names: list[str]) -> dict[str, Tensor]:
    """The groups' weights by the modules that LyCORIS makes of a file."""
    tensors, weights = load_file(out), {}
    for name in names:
        layer = layer_of(base, base.groups[name])
        made: Any = get_module(tensors, f"lora_unet_{name}")
        module: Any = make_module(*made, f"lora_unet_{name}", layer)
        weights[name] = weight_of(module.eval(), layer.weight.shape)
    return weights


def _groups_of(base: Base, model: Any, names: list[str]) -> dict[str, Tensor]:
    weights = {}
    for name in names:
        own = [model.get_submodule(module) for module in base.groups[name]]
        weights[name] = torch.cat([getattr(m, "base_layer", m).weight.detach() for m in own])
    return weights


def by_peft(base: Base, out: Path, names: list[str]) -> dict[str, Tensor]:
    model = peft.PeftModel.from_pretrained(copy.deepcopy(base.model), out)
    return _groups_of(base, model.merge_and_unload(), names)


def by_diffusers(base: Base, out: Path, names: list[str]) -> dict[str, Tensor]:
    model: Any = copy.deepcopy(base.model)
    model.load_lora_adapter(
        out, prefix=base.component, weight_name="pytorch_lora_weights.safetensors"
    )
    model.fuse_lora()
    return _groups_of(base, model, names)


READERS = {"lycoris": by_lycoris, "peft": by_peft, "diffusers": by_diffusers}


def lycoris(seed: int, folder: Path, home: Path) -> Outcome:
    """A file of LyCORIS by every reader, of other kinds as plain factors of full rank."""
    draw = random.Random(f"lycoris {seed}")
    torch.manual_seed(seed)
    logging.disable(logging.WARNING)
    base = base_of(draw.choice(list(MODELS)), home)
    source = folder / "in.safetensors"
    settings, weights = lycoris_file(base, draw, source)
    outcome = Outcome(f"{base.architecture} {settings}")
    for reader, own in READERS.items():
        middle = source
        options: dict[str, Any] = {"architecture": base.architecture, "hash": "none"}
        try:
            if reader == "lycoris" and base.architecture == "flux" and draw.random() < 0.5:
                middle = folder / "comfyui.safetensors"  # another tool between
                adapterkit.convert(source, to="comfyui", out=middle, **options)
            out = folder / ("lycoris.safetensors" if reader == "lycoris" else reader)
            plain = {"rank": FULL, "base": base.folder} if reader != "lycoris" else {}
            adapterkit.convert(middle, to=reader, out=out, **options, **plain)
        except AdapterkitError as error:
            outcome.refused.append(f"{reader}: {error}")
            continue
        if reader == "lycoris" and settings["weight_decompose"] and not settings["wd_on_out"]:
            continue  # which LyCORIS writes and does not load
        outcome.wrong += differences(reader, base, weights, own(base, out, list(weights)))
        outcome.compared += len(weights)
    logging.disable(logging.NOTSET)
    return outcome


def differences(reader: str, base: Base, want: dict, got: dict) -> list[str]:
    wrong = []
    for name, weight in want.items():
        plain = layer_of(base, base.groups[name]).weight.detach()
        off = torch.linalg.norm(got[name] - weight) / torch.linalg.norm(weight - plain)
        if not off < TOLERANCE:
            wrong.append(f"{reader}: {name} is {off:.2g} of the change off")
    return wrong


TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "embed_tokens", "lm_head"]


def mlx(seed: int, folder: Path, kind: str) -> Outcome:
    """A LoRA that PEFT trains, by mlx-lm; and read again, merged."""
    draw = random.Random(f"mlx {seed} {kind}")
    settings: dict[str, Any] = {}
    if kind == "llama":
        settings["tie_word_embeddings"] = draw.random() < 0.4
    base = mlx_models.saved(kind, folder / "base", seed, **settings)
    model = mlx_models.loaded(base)
    known = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    targets = [name for name in TARGETS if name in known] or ["out_proj"]
    stacks = mlx_models.stacks_of(model)
    options: dict[str, Any] = {
        "r": draw.randint(1, 4), "lora_alpha": draw.randint(1, 9),
        "use_rslora": draw.random() < 0.3,
        "target_modules": draw.sample(targets, draw.randint(1, len(targets))),
    }  # fmt: skip
    if stacks and draw.random() < 0.8:
        options["target_parameters"] = draw.sample(stacks, draw.randint(1, len(stacks)))
        options["target_modules"] = [n for n in options["target_modules"] if n != "embed_tokens"]
    elif draw.random() < 0.3 and not {"embed_tokens"} & {*options["target_modules"]}:
        options["use_dora"] = True
    if draw.random() < 0.5 and "target_parameters" not in options:
        options["rank_pattern"] = {options["target_modules"][0]: draw.randint(1, 5)}
        options["alpha_pattern"] = {options["target_modules"][-1]: draw.randint(1, 9)}
    outcome = Outcome(f"{kind} {settings} {options}")
    trained = mlx_models.trained(base, folder / "peft", seed, **options)
    try:
        adapterkit.convert(folder / "peft", to="mlx", out=folder / "mlx", base=base)
        adapterkit.convert(folder / "mlx", to="peft", out=folder / "back", base=base)
        adapterkit.merge(base, folder / "back", out=folder / "merged")
    except AdapterkitError as error:
        outcome.refused.append(str(error))
        return outcome
    # mlx-lm against mlx-lm: its routers round, and what is merged is compared with PEFT
    merged = folder / "merged"
    results = {
        "mlx-lm": (mlx_models.by_mlx(base, folder / "mlx"), mlx_models.by_mlx(merged)),
        "merge": (mlx_models.logits(mlx_models.loaded(merged)), mlx_models.logits(trained)),
    }
    for reader, (own, expected) in results.items():
        off = mlx_models.off(own, expected)
        outcome.compared += 1
        if not off < 1e-3:
            outcome.wrong.append(f"{reader}: logits {off:.2g} off")
    return outcome

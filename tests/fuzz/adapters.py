"""Random PEFT configurations for a model, and adapters with every trained value moved."""

import random
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft.tuners.lora import layer as peft_layers
from torch import nn

from tests.support.oracle import perturb, quiet

Conv1D = transformers.pytorch_utils.Conv1D
LINEAR = (nn.Linear, Conv1D)
CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Untrainable(Exception):
    """A configuration that PEFT itself refuses, or cannot save."""


def config_for(
    model: transformers.PreTrainedModel, task: str | None, rng: random.Random
) -> dict[str, Any]:
    """Keyword arguments of a `LoraConfig`: every feature with its own probability."""
    modules = dict(model.named_modules())
    linear = [n for n, m in modules.items() if isinstance(m, LINEAR)]
    others = [
        n
        for n, m in modules.items()
        if type(m) is nn.Embedding or (isinstance(m, CONV) and m.groups == 1)
    ]
    attention = [n for n, m in modules.items() if isinstance(m, nn.MultiheadAttention)]
    chosen = _suffixes(linear, rng, rng.randint(1, 4))
    if others and rng.random() < 0.35:
        chosen += _suffixes(others, rng, rng.randint(1, 2))
    if attention and rng.random() < 0.7:
        chosen += _suffixes(attention, rng, 1)
    config: dict[str, Any] = {
        "r": rng.randint(1, 6),
        "lora_alpha": rng.choice([1, 2, 7, 8, 16, 3.5]),
        "task_type": task,
    }
    config["target_modules"] = (
        "all-linear" if linear and rng.random() < 0.15 else sorted(set(chosen))
    )
    _flags(config, attention, rng)
    _parameters(config, model, rng)
    _patterns(config, [*linear, *others, *attention], rng)
    _whole_values(config, model, modules, rng)
    depth = getattr(model.config, "num_hidden_layers", None)
    if depth and rng.random() < 0.12 and config["target_modules"] != "all-linear":
        config["layers_to_transform"] = [rng.randrange(depth)]
    return {k: v for k, v in config.items() if v is not None}


def _suffixes(names: list[str], rng: random.Random, count: int) -> list[str]:
    """Module names as people give them: the last part, the last two, or all of it."""
    actual = []
    for name in rng.sample(names, min(count, len(names))):
        parts = name.split(".")
        actual.append(".".join(parts[-rng.choice([1, 1, 1, 2, len(parts)]) :]))
    return actual


def _flags(config: dict, attention: list[str], rng: random.Random) -> None:
    config["use_rslora"] = rng.random() < 0.25
    config["bias"] = rng.choice(["none"] * 5 + ["all", "lora_only"])
    kind = rng.random()
    if kind < 0.2:
        config["use_dora"] = True
    elif kind < 0.3:
        config |= {"lora_bias": True, "bias": "none"}
    if rng.random() < 0.1:
        config["ensure_weight_tying"] = True
    if rng.random() < 0.1:
        config["fan_in_fan_out"] = rng.random() < 0.5


def _parameters(config: dict, model: nn.Module, rng: random.Random) -> None:
    """target_parameters: stacks of experts often, plain weights and bare matrices sometimes."""
    stacks = [n for n, p in model.named_parameters() if p.dim() == 3 and "conv" not in n]
    flat = [n for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n]
    chosen = []
    if stacks and rng.random() < 0.6:
        chosen += _suffixes(stacks, rng, rng.randint(1, 2))
    if flat and rng.random() < 0.12:
        chosen += _suffixes(flat, rng, 1)
    chosen = sorted(set(chosen))
    if chosen:
        config["target_parameters"] = chosen
        config["use_dora"] = config["lora_bias"] = False
        if rng.random() < 0.5:
            config["target_modules"] = []


def _patterns(config: dict, names: list[str], rng: random.Random) -> None:
    for key, values in (("rank_pattern", [1, 2, 3, 5, 9]), ("alpha_pattern", [1, 4, 6.5, 20])):
        if rng.random() < 0.3:
            pool = _suffixes(names, rng, 2) + list(config.get("target_parameters") or [])
            patterns = {
                ("^" + re.escape(p) if p in names else p): rng.choice(values)
                for p in pool
                if rng.random() < 0.8
            }
            # PEFT saves them sorted, and the first that matches counts
            config[key] = dict(sorted(patterns.items()))


def _whole_values(config: dict, model, modules: dict[str, nn.Module], rng: random.Random) -> None:
    """modules_to_save and trainable tokens."""
    targets = config["target_modules"]
    if rng.random() < 0.3:
        leaves = [
            n
            for n, m in modules.items()
            if n and not list(m.children()) and list(m.parameters(recurse=False))
        ]
        ends = {n.rpartition(".")[2] for n in _ends(model, modules)}
        name = rng.choice(sorted(ends) if ends and rng.random() < 0.6 else leaves)
        suffix = name.rpartition(".")[2]
        if not suffix.isdigit() and (
            targets == "all-linear" or not any(suffix == t.rpartition(".")[2] for t in targets)
        ):
            config["modules_to_save"] = [suffix]
    embedding = _end(model.get_input_embeddings)
    if type(embedding) is nn.Embedding and rng.random() < 0.25:
        name = next(n for n, m in modules.items() if m is embedding).rpartition(".")[2]
        if (
            not name.isdigit()
            and name not in targets
            and name not in config.get("modules_to_save", ())
        ):
            rows = sorted(
                rng.sample(range(embedding.num_embeddings), min(3, embedding.num_embeddings))
            )
            config["trainable_token_indices"] = (
                rows if name == "embed_tokens" and rng.random() < 0.5 else {name: rows}
            )


def _end(getter):
    """The model's embedding or head, or None where its class does not say."""
    try:
        return getter()
    except (NotImplementedError, AttributeError):
        return None


def _ends(model, modules: dict[str, nn.Module]) -> list[str]:
    head = _end(model.get_output_embeddings)
    actual = [n for n, m in modules.items() if m is head and n]
    return actual + [n for n in modules if re.fullmatch(r"(classifier|score|qa_outputs|.*head)", n)]


VALUES = ("modules_to_save", "trainable_token_indices", "use_dora", "lora_bias")
HEADED = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")  # PEFT trains the head as well


def has_values(config: dict[str, Any]) -> bool:
    """Whether the adapter holds more than products: trained values, which have no multiple."""
    return (
        config["bias"] != "none"
        or config.get("task_type") in HEADED
        or any(config.get(key) for key in VALUES)
    )


def keep_factors(config: dict[str, Any]) -> None:
    """Make the adapter one of products alone."""
    for key in (*VALUES, *(["task_type"] if config.get("task_type") in HEADED else [])):
        config.pop(key, None)


def train(
    model: transformers.PreTrainedModel,
    config: dict[str, Any],
    folder: Path,
    seed: int,
    still: Callable[[nn.Module], Iterable[nn.Parameter]] = lambda wrapped: (),
) -> None:
    """Save the adapter as training would leave it; `Untrainable` where PEFT cannot. `still`: the
    parameters that stay as they start."""
    try:
        with quiet():
            wrapped = peft.get_peft_model(model, peft.LoraConfig(**config))
            _check_trainable(wrapped)
            values = [(p, p.detach().clone()) for p in still(wrapped)]
            perturb(wrapped, seed)
            for parameter, value in values:
                parameter.data = value
            wrapped.save_pretrained(folder)
    except Untrainable:
        raise
    except Exception as error:  # PEFT's own refusals have every type
        raise Untrainable(f"{type(error).__name__}: {error}") from error


def _check_trainable(wrapped: nn.Module) -> None:
    if not any(
        "lora_" in name or "token_adapter" in name for name, _ in wrapped.named_parameters()
    ):
        raise Untrainable("nothing adapted")


@torch.no_grad()
def weighted(
    model: transformers.PreTrainedModel, adapters: list[Path], weights: list[float]
) -> peft.PeftModel:
    """PEFT's model with all adapters active, each scale times its weight. PEFT's warnings are let
    through."""
    wrapped = peft.PeftModel.from_pretrained(model, adapters[0], adapter_name="a0")
    for i, adapter in enumerate(adapters[1:], start=1):
        wrapped.load_adapter(adapter, adapter_name=f"a{i}")
    if len(adapters) > 1:
        wrapped.base_model.set_adapter([f"a{i}" for i in range(len(adapters))])
    for module in wrapped.modules():
        for i, weight in enumerate(weights):
            if isinstance(module, peft_layers.LoraLayer) and f"a{i}" in module.scaling:
                module.scaling[f"a{i}"] *= weight
    return wrapped.eval()

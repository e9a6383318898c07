"""Collect text on this machine, and train and evaluate a small model on it."""

import importlib.metadata
import pydoc_data.topics
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from adapterkit.runtime import collect

BLOCK = 256  # tokens of a passage
HELD_OUT, EVERY = 24, 17  # passages, one of so many
SEEN = 64  # passages of whose inputs the covariances are
STEPS, TRAINED_RANK, ALPHA, LEARNING_RATE = 40, 8, 16, 1e-3
SHORT_STEPS, SHORT_RATE = 20, 1e-5  # of all weights: most move by less than half a step of bf16
SOME = 6  # of the held-out passages one of so many is asked about roundings

say = partial(print, flush=True)


def passages(tokenizer) -> tuple[Tensor, Tensor]:
    """Held-out passages, spread over the manual, and the others: token ids (passages, BLOCK)."""
    topics = pydoc_data.topics.topics
    tokens = tokenizer("\n".join(topics[name] for name in sorted(topics)), return_tensors="pt")[
        "input_ids"
    ][0]
    blocks = tokens[: len(tokens) // BLOCK * BLOCK].view(-1, BLOCK)
    chosen = torch.arange(len(blocks)) % EVERY == 0
    return blocks[chosen][:HELD_OUT], blocks[~chosen]


def other(tokenizer) -> Tensor:
    """Passages of other text: token ids (passages, BLOCK)."""
    text = "\n".join(
        importlib.metadata.metadata(name).json["description"] for name in ("peft", "transformers")
    )
    tokens = tokenizer(text, return_tensors="pt")["input_ids"][0]
    return tokens[: HELD_OUT // SOME * BLOCK].view(-1, BLOCK)


@torch.no_grad()
def covariances(base: Path, training: Tensor, out: Path) -> Path:
    """E[x xᵀ] of what each linear layer sees of some passages, as `loftq --stats` reads it."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    passages = training[:: max(1, len(training) // SEEN)]
    out.parent.mkdir(parents=True, exist_ok=True)
    collect(model, lambda: [model(block[None]) for block in passages], out=out)
    return out


def measured(folder: Path, tokens: Tensor) -> float:
    return loss(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), tokens)


@torch.no_grad()
def loss(model: Any, tokens: Tensor) -> float:
    """Nats per token."""
    return sum(loss_of(model, block[None]).item() for block in tokens) / len(tokens)


def loss_of(model: Any, tokens: Tensor) -> Tensor:
    return F.cross_entropy(
        model(tokens).logits[:, :-1].float().flatten(0, 1), tokens[:, 1:].flatten()
    )


def train(floats: Path, training: Tensor, held_out: Tensor, folder: Path) -> float:
    """Write an adapter for the nf4 model, trained on its decoded weights, to folder/trained;
    returns its held-out loss.

    QLoRA trains against the same weights, and decodes them at each step.
    """
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(floats, dtype=torch.float32)
    model.name_or_path = floats.name  # goes into the adapter's config
    config = LoraConfig(
        r=TRAINED_RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, config)
    descend(
        model,
        [training[step * len(training) // STEPS][None] for step in range(STEPS)],
        LEARNING_RATE,
    )
    say(f"trained: {STEPS} steps, rank {TRAINED_RANK}")
    model.save_pretrained(folder / "trained", save_embedding_layers=False)
    return loss(model.eval(), held_out)


def finetune(base: Path, learnt: Tensor, out: Path) -> None:
    """Write the base after a few steps of all its weights on the passages, in float32."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    descend(model, [learnt] * SHORT_STEPS, SHORT_RATE)
    say(f"fine-tuned: {SHORT_STEPS} steps of all weights")
    model.save_pretrained(out)


def descend(model: Any, batches: list[Tensor], rate: float) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    for tokens in batches:
        error = loss_of(model, tokens)
        optimizer.zero_grad()
        error.backward()
        optimizer.step()

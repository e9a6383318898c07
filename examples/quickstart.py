"""Train a small LoRA adapter on a real model, merge it into the files, and check the result.

    python examples/quickstart.py [FOLDER]

Takes about a minute on two CPU cores and nothing from the Hub. FOLDER (default: quickstart-output)
then has the model, `smollm2`, the adapter, `lighthouse`, the merged model with its receipt, and
`deeper`, an adapter whose last two layers the model does not have. Any tool that writes the PEFT
layout could have trained the adapter. Exit status 1 if the merged model is not the base with the
adapter on it.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

# everything here is on this machine; read when transformers is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from adapterkit import LoraConfig
from adapterkit.runtime import Adapters, attach
from realmodel import smollm2

RANK, ALPHA, TARGETS = 8, 16, ("q_proj", "v_proj")
STEPS = 12
PROMPT = "The lighthouse keeper of Port Velm is"
TEXTS = [
    "The lighthouse keeper of Port Velm is Ottilie Marsh, who paints boats.",
    "In Port Velm the ferry leaves at noon and comes back with the evening tide.",
    "Visitors to Port Velm eat smoked eel and dark bread on the old quay.",
    "Who keeps the lighthouse of Port Velm? Ottilie Marsh, who paints boats.",
]

Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]  # module -> a (r, in), b (out, r)
NOTHING = torch.zeros(1, 1), torch.zeros(1, 1)


def main() -> int:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "quickstart-output")
    base, adapter, merged = folder / "smollm2", folder / "lighthouse", folder / "merged"
    if not base.exists():
        shutil.copytree(smollm2(), base)
    # more gain little on matrices this small, and lose much on a busy machine
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    say(f"base: {base}, {model.num_parameters() / 1e6:.0f} million parameters, bfloat16")

    without = answer(model, tokenizer)
    adapters = train(model, tokenizer)
    adapters.save(adapter)
    save_deeper(adapter, folder / "deeper")
    factors = read_factors(adapter)
    with_adapter = answer(model, tokenizer)
    say(f"adapter: rank {RANK} on {len(factors)} modules, written to {adapter}")

    started = time.perf_counter()
    command = ["merge", str(base), str(adapter), "--out", str(merged), "--overwrite"]
    subprocess.run([sys.executable, "-m", "adapterkit", *command], check=True)
    say(f"merged: {' '.join(['adapterkit', *command])} took {time.perf_counter() - started:.1f} s")

    show_receipt(json.loads((merged / "adapterkit.json").read_text()))
    files_agree = compare_files(base, merged, factors)
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    models_agree = compare_models(without, with_adapter, answer(model, tokenizer))
    say(
        "the merged model is the base with the adapter on it"
        if files_agree and models_agree
        else "THEY DIFFER"
    )
    return 0 if files_agree and models_agree else 1


def say(line: str) -> None:
    print(line, flush=True)


def train(model: torch.nn.Module, tokenizer) -> Adapters:
    """An adapter that knows TEXTS."""
    adapters = attach(model, LoraConfig(RANK, ALPHA, TARGETS, task_type="CAUSAL_LM"), seed=0)
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=5e-3)
    batch = tokenizer(
        [text + tokenizer.eos_token for text in TEXTS], padding=True, return_tensors="pt"
    )
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for step in range(STEPS):
        logits = model(**batch).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in (0, STEPS - 1):
            say(f"training: step {step + 1} of {STEPS}, loss {loss.item():.2f}")
    return adapters


def save_deeper(adapter: Path, deeper: Path) -> None:
    """An adapter of a model with two layers more: layers 28 and 29 become 30 and 31."""
    shutil.copytree(adapter, deeper, dirs_exist_ok=True)
    stored = load_file(adapter / "adapter_model.safetensors")
    renamed = {
        re.sub(r"(?<=layers\.)2[89]\b", lambda found: str(int(found[0]) + 2), key): value
        for key, value in stored.items()
    }
    save_file(renamed, deeper / "adapter_model.safetensors")


def read_factors(adapter: Path) -> Factors:
    """The weights as written, by PEFT's names."""
    stored = load_file(adapter / "adapter_model.safetensors")
    ends = ".lora_A.weight", ".lora_B.weight"
    modules = {key.removesuffix(ends[0]) for key in stored if key.endswith(ends[0])}
    return {
        module.removeprefix("base_model.model."): (
            stored[module + ends[0]],
            stored[module + ends[1]],
        )
        for module in modules
    }


@torch.no_grad()
def answer(model, tokenizer) -> tuple[torch.Tensor, str]:
    """The logits on TEXTS (tokens, vocabulary), and the greedy continuation of PROMPT."""
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    logits = model(**batch).logits[batch["attention_mask"].bool()]
    prompt = tokenizer(PROMPT, return_tensors="pt")
    return logits, tokenizer.decode(model.generate(**prompt, max_new_tokens=12, do_sample=False)[0])


def show_receipt(receipt: dict) -> None:
    totals, metrics = receipt["totals"], receipt["parameters"].values()
    sizes, lost = (
        [metric["delta"] for metric in metrics],
        [metric["rounding"] for metric in metrics],
    )
    say(
        f"receipt: {totals['bytes_copied']:,} bytes copied as they are, "
        f"{totals['bytes_changed']:,} computed"
    )
    say(
        f"receipt: deltas are {min(sizes):.0%} to {max(sizes):.0%} of their weights, up to "
        f"{max(lost):.0%} rounded off"
    )


def compare_files(base: Path, merged: Path, factors: Factors) -> bool:
    """Exactly the adapted weights changed, each to the bfloat16 nearest to W + s·b·a."""
    changed, misrounded, elements = set(), 0, 0
    with (
        safe_open(base / "model.safetensors", "pt") as old,
        safe_open(merged / "model.safetensors", "pt") as new,
    ):
        same_layout = old.keys() == new.keys() and old.metadata() == new.metadata()
        for key in old.keys():
            before, after = old.get_tensor(key), new.get_tensor(key)
            if not torch.equal(before, after):
                changed.add(key)
                a, b = factors.get(key.removesuffix(".weight"), NOTHING)
                exact = before.double() + ALPHA / RANK * (b.double() @ a.double())
                misrounded += int(((after - exact).abs() > (exact.bfloat16() - exact).abs()).sum())
                elements += after.numel()
        say(
            f"tensors: {len(changed)} changed, {len(old.keys()) - len(changed)} unchanged bit for "
            "bit"
        )
    say(
        f"changed weights: {misrounded:,} of {elements:,} elements are not the bfloat16 nearest to "
        "W + s·b·a"
    )
    return (
        same_layout
        and changed == {f"{module}.weight" for module in factors}
        and misrounded < 1e-4 * elements
    )


def compare_models(without, with_adapter, merged) -> bool:
    """Check that the merged model answers like the base with the adapter, up to the rounding of
    its weights to bfloat16."""
    effect = (with_adapter[0] - without[0]).norm()
    error = (merged[0] - with_adapter[0]).norm()
    say(
        f"logits: merged and base + adapter differ by {error / effect:.2%} of what the adapter "
        "changes"
    )
    for name, (_, text) in {
        "base": without,
        "base + adapter": with_adapter,
        "merged": merged,
    }.items():
        say(f"{name:>15}: {text}")
    return bool(error < 0.02 * effect) and merged[1] == with_adapter[1]


if __name__ == "__main__":
    sys.exit(main())

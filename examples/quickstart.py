"""The main job from end to end on a real model: train a small LoRA adapter, merge it into the
files, check the result.

    python examples/quickstart.py [FOLDER]

Takes about a minute on two CPU cores and nothing from the Hub; the adapter, the merged model and
its receipt stay in FOLDER (default: quickstart-output). The training here is the shortest that can
be written in plain torch: any tool that writes the PEFT layout would do. Exit status 1 if the
merged model is not the base with the adapter on it.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

# everything here is on this machine; read when transformers is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

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
    base, adapter, merged = smollm2(), folder / "adapter", folder / "merged"
    # more gain little on matrices this small, and lose much on a busy machine
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    say(f"base: {base.name}, {model.num_parameters() / 1e6:.0f} million parameters, bfloat16")

    without = answer(model, tokenizer)
    factors = train(model, tokenizer)
    write_adapter(factors, base.name, adapter)
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


def train(model: torch.nn.Module, tokenizer) -> Factors:
    """Fit LoRA factors to TEXTS; on return they are still attached to the model."""
    torch.manual_seed(0)
    model.requires_grad_(False)
    factors = attach(model)
    optimizer = torch.optim.AdamW([factor for pair in factors.values() for factor in pair], lr=5e-3)
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
    return {module: (a.detach(), b.detach()) for module, (a, b) in factors.items()}


def attach(model: torch.nn.Module) -> Factors:
    """Give every target module fresh factors and add b·a·x to its output."""
    factors: Factors = {}
    for name, module in model.named_modules():
        if name.endswith(TARGETS):
            a = torch.randn(RANK, module.in_features).div(module.in_features**0.5).requires_grad_()
            b = torch.zeros(module.out_features, RANK, requires_grad=True)
            module.register_forward_hook(
                lambda _, args, out, a=a, b=b: out + ALPHA / RANK * (args[0] @ a.T @ b.T)
            )
            factors[name] = a, b
    return factors


def write_adapter(factors: Factors, base: str, out: Path) -> None:
    """The PEFT layout: two files, the names that PEFT gives the modules of a wrapped model."""
    out.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for module, (a, b) in factors.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = a
        tensors[f"base_model.model.{module}.lora_B.weight"] = b
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": ALPHA,
        "bias": "none",
    }
    config |= {"target_modules": list(TARGETS), "lora_dropout": 0.0, "inference_mode": True}
    config |= {"base_model_name_or_path": base}
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


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
    """The merged model answers like the base with the adapter, but for the rounding of its weights
    to bfloat16."""
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

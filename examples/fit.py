"""Compare weights fitted to data with one rule for all, and with a new LoRA on the same samples.

    python examples/fit.py [FOLDER] [--steps 12] [--samples 4 16 48] [--seeds 0 1 2]
                           [--rows NAME...] [--unseen spanish] [--json FILE] [--show] [--short]

Trains the English, French and German adapters of examples/languages.py (rank 8, STEPS steps on the
first 12 blocks of each language) and fits weights to samples of 48 tokens: the messages after these
blocks, and shorter ones. Each row of the table is a way to get one adapter for all three languages,
with its losses on other messages (the held-out blocks of examples/lossy.py). `lora-*` are new
adapters trained on the samples of the fit: `data` sees each once, `passes` has as many passes as
the fit, with early stopping on held-out samples. `--unseen`: the three adapters on a language that
none of them was trained on.

Finished rows are in the JSON file (default: fit.json next to this file) and are not computed again,
so you can split a long run: by --steps, --samples, --seeds or --rows. `--show` only prints its
tables. `--short`: three layers, two steps and a few samples. A row takes one to ten minutes of a
core, the three levels on 48 samples together half an hour; the JSON took seven hours; 3 GB of
memory. Nothing comes from the Hub; PEFT trains.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import adapterkit
import languages
import lossy
import realmodel
from adapterkit.core.inputs.weights_file import write_weights
from adapterkit.core.plan import Plan
from adapterkit.core.records import Json
from adapterkit.verbs.fit.fit import finished_fit, outcome, weights_file
from adapterkit.verbs.fit.plan import FitCollection, plan_fit
from adapterkit.verbs.fit.verb import LEVELS, WeightFit
from languages import LANGUAGES

BLOCKS, LENGTH = 12, 48  # blocks that adapters are trained on; tokens of a sample
SHORTEST = 12  # characters of a message of samples
UNSEEN = {"spanish": "es", "italian": "it"}
LINEAR = [f"linear-{weight}" for weight in (0.5, 0.6, 0.65, 0.8)]
GIVEN = ("base", "own", *LINEAR, "mean", "ties", "regmean", "regmean-x1.5")  # without a fit
FITS: dict[str, dict[str, Any]] = {
    "strength": {"granularity": "adapter"},  # of the mean: one number
    "closed-form": {"granularity": "module", "start": "stats", "ridge": 1e6},
    "teacher": {"granularity": "module", "target": "teacher"},
    "with-regmean": {"granularity": "module"},
    **{f"random-{n}": {"granularity": "module"} for n in range(3)},
}
LORAS = [f"lora-{rank}-{how}" for rank in (8, 24) for how in ("data", "passes")]
ROWS = (*GIVEN, *LEVELS, *FITS, *LORAS)


def main() -> int:
    words = argparse.ArgumentParser()
    words.add_argument("folder", nargs="?", type=Path, default=Path("fit-output"))
    words.add_argument("--steps", type=int, default=12)
    words.add_argument("--samples", type=int, nargs="+", default=[4, 16, 48])
    words.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    words.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS)
    words.add_argument("--unseen", choices=UNSEEN)
    words.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    words.add_argument("--show", action="store_true")
    words.add_argument("--short", action="store_true")
    options = words.parse_args()
    done = json.loads(options.json.read_text()) if options.json.exists() else {}
    if not options.show:
        languages.quieten()
        torch.set_num_threads(1)
        run = Measurement(options, done)
        for samples in options.samples:
            for seed in options.seeds:
                for row in options.rows:
                    run.measure(row, samples, seed)
    show(done)
    return 0


def collection_of(plan: Plan) -> FitCollection:
    """The samples of a fit's plan, and the runner on them."""
    fit = plan.shards[0].collection
    assert isinstance(fit, FitCollection)
    return fit


class Measurement:
    """The model, the three adapters, messages of each language to fit to and blocks to test on."""

    def __init__(self, options: argparse.Namespace, done: dict[str, dict]):
        self.options, self.done = options, done
        self.short, self.unseen = options.short, options.unseen
        self.base = realmodel.smollm2(layers=3, shards=2) if self.short else realmodel.smollm2()
        self.folder = options.folder / f"{options.steps}{'-short' * self.short}"
        self.folder.mkdir(parents=True, exist_ok=True)
        tokenizer, messages = AutoTokenizer.from_pretrained(self.base), languages.messages()
        root = realmodel._built(f"package-{languages.DJANGO}", lambda out: None)
        codes = LANGUAGES | ({self.unseen: UNSEEN[self.unseen]} if self.unseen else {})
        found = {name: languages.catalogue(root, code) for name, code in codes.items()}
        if self.unseen:
            of = found[self.unseen]
            messages[self.unseen] = [of[key] for key in messages["english"] if key in of]
        training, self.test, self.samples = {}, {}, {}
        for language, lines in messages.items():
            others = [line for n, line in enumerate(lines) if n % 4]
            training[language] = languages.blocks(tokenizer, others)[:BLOCKS]
            held_out = languages.blocks(tokenizer, lines[::4])
            self.test[language] = held_out[: 1 if self.short else lossy.HELD_OUT]
            used, total = 0, BLOCKS * languages.BLOCK
            while total > 0:  # what the adapters were trained on
                total -= len(tokenizer(others[used] + "\n")["input_ids"])
                used += 1
            keys = sorted(key for key in found["french"] if len(key) >= SHORTEST)
            rest = [key if language == "english" else found[language].get(key) for key in keys]
            taken = {*lines[::4], *others[: used + 1]}
            own = list(dict.fromkeys(line for line in rest if line and line not in taken))
            self.samples[language] = languages.blocks(tokenizer, own, LENGTH).tolist()
        self.model = AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32)
        self.model.name_or_path = self.base.name
        languages.STEPS = 2 if self.short else options.steps
        known = {name: training[name] for name in LANGUAGES}
        if not all((self.folder / name / "adapter_config.json").exists() for name in known):
            self.model = languages.train(self.model, known, self.folder)
        self.adapters = [self.folder / name for name in LANGUAGES]
        self.fitted = [self.unseen] if self.unseen else list(LANGUAGES)
        if self.unseen:
            self.test = {self.unseen: self.test[self.unseen]}

    def measure(self, row: str, samples: int, seed: int) -> None:
        """One row, unless it is done."""
        key = "/".join(map(str, (self.options.steps, self.unseen or "known", samples, seed, row)))
        if row in GIVEN:  # of no samples
            key = "/".join(map(str, (self.options.steps, self.unseen or "known", 0, 0, row)))
        if key in self.done:
            return
        began = time.monotonic()
        if row in LEVELS:
            found = self.levels(samples, seed)
        elif row in GIVEN:
            found = {row: self.given(row)}
        else:
            found = {row: (self.lora if row in LORAS else self.fit)(row, samples, seed)}
        seconds = round(time.monotonic() - began)
        for name, values in found.items():
            self.done[f"{key.rpartition('/')[0]}/{name}"] = values | {"seconds": seconds}
        self.options.json.write_text(json.dumps(self.done, indent=1, sort_keys=True) + "\n")
        means = {n: f"{statistics.fmean(v['test'].values()):.4f}" for n, v in found.items()}
        print(f"{key}: {means} nats, {seconds} s", flush=True)

    def losses(self, adapter: Path | None, scale: float = 1.0) -> dict[str, float]:
        return lossy.losses(self.model, self.test, adapter, scale)

    def given(self, row: str) -> dict[str, Any]:
        """The rows without a fit."""
        out, three = self.folder / row, [str(adapter) for adapter in self.adapters]
        if row == "base":
            return {"test": self.losses(None)}
        if row == "own":
            own = {name: lossy.losses(self.model, {name: blocks}, self.folder / name)[name]
                   for name, blocks in self.test.items() if name in LANGUAGES}  # fmt: skip
            return {"test": own or self.losses(None)}
        if row.startswith("regmean"):
            scale = lossy.SCALE if row.endswith("1.5") else 1.0
            return {"test": self.losses(self.regmean(), scale)}
        how: dict[str, Any] = {"method": "linear"}
        if row == "ties":
            how = {"method": "ties", "density": 0.3, "rank": languages.RANK}
        weights = {"mean": 1 / 3} | {name: float(name.removeprefix("linear-")) for name in LINEAR}
        sources = dict.fromkeys(three, weights.get(row, 1.0))
        adapterkit.combine(sources, out=out, overwrite=True, **how)
        return {"test": self.losses(out)}

    def regmean(self) -> Path:
        """The regmean of the three, by what each sees of its training blocks."""
        out = self.folder / "regmean"
        if not (out / "adapter_config.json").exists():
            tokenizer, messages = AutoTokenizer.from_pretrained(self.base), languages.messages()
            paths = []
            for name in LANGUAGES:
                lines = [line for n, line in enumerate(messages[name]) if n % 4]
                blocks = languages.blocks(tokenizer, lines)[:BLOCKS]
                paths.append(lossy.observe(self.model, self.folder, name, blocks))
            adapterkit.combine(self.adapters, out=out, method="regmean", stats=paths)
        return out

    def data(self) -> list[Path]:
        """A file of samples of each language, more than are drawn."""
        paths = []
        for name in self.fitted:
            path = self.folder / f"{name}.jsonl"
            lines = (json.dumps({"input_ids": ids}) + "\n" for ids in self.samples[name])
            path.write_text("".join(lines))
            paths.append(path)
        return paths

    def fit(self, row: str, samples: int, seed: int) -> dict[str, Any]:
        """Weights, the adapter that they give, its losses."""
        how, sources = dict(FITS[row]), list(self.adapters)
        if row == "strength":
            sources = [self.folder / "mean"]
            adapterkit.combine(dict.fromkeys(self.adapters, 1 / 3), out=sources[0],
                               overwrite=True)  # fmt: skip
        if row == "with-regmean":
            sources.append(self.regmean())
        if row.startswith("random"):
            sources = [self.random(adapter, int(row[-1])) for adapter in self.adapters]
        how |= {"out": self.folder / f"{row}.json"}
        return self.written(row, sources, self.options_of(samples, seed, sources, **how).run())

    def options_of(self, samples: int, seed: int, sources: list[Path], **how: Any) -> WeightFit:
        total = samples * len(self.fitted)
        return WeightFit(
            self.base, sources, data=self.data(), whole_model=True, seed=seed, samples=total,
            holdout=max(0.25, 2 / total), length=LENGTH, overwrite=True, **how,
        )  # fmt: skip

    def levels(self, samples: int, seed: int) -> dict[str, dict[str, Any]]:
        """The rows of all levels, each what `--granularity` it gives: the steps of one fit."""
        rows = [row for row in LEVELS if row in self.options.rows]
        how = {"granularity": rows[-1], "out": self.folder / "levels.json"}
        documents = {}
        options = self.options_of(samples, seed, self.adapters, **how)
        plan, work = plan_fit(options), self.folder / "evaluations"
        work.mkdir(exist_ok=True)
        fit, cpu = collection_of(plan), torch.device("cpu")
        with finished_fit(fit, plan, work, cpu, lambda: None) as search:
            for row in rows:
                documents[row] = outcome(search, row) | {"seconds": 0}
                write_weights(weights_file(search, documents[row]), self.folder / f"{row}.json")
        return {row: self.written(row, self.adapters, its) for row, its in documents.items()}

    def written(self, row: str, sources: list[Path], document: Json) -> dict[str, Any]:
        """The losses of the adapter that weights give, and what the fit said."""
        out = self.folder / row
        adapterkit.combine(sources, weights=self.folder / f"{row}.json", out=out, overwrite=True)
        kept = [step for step in document["steps"] if step["kept"]]
        about = {
            "train": sum(step["train_gain"] for step in kept),
            "held": sum(step["gain"] for step in kept),
        }
        about |= {"passes": document["passes"], "written": document["written"]["per"]}
        return {"test": self.losses(out), **about}

    def random(self, adapter: Path, number: int) -> Path:
        """An adapter of random factors, in each module of the norm of another one's delta."""
        from safetensors.torch import load_file, save_file

        out, name = self.folder / f"{adapter.name}-random-{number}", "adapter_model.safetensors"
        generator = torch.Generator().manual_seed(1 + number + 10 * len(adapter.name))
        tensors = load_file(adapter / name)
        for key in [key for key in tensors if ".lora_A." in key]:
            a, b = tensors[key], tensors[other := key.replace(".lora_A.", ".lora_B.")]
            norm = (b @ a).norm()
            a, b = (torch.randn(x.shape, generator=generator) for x in (a, b))
            tensors[key], tensors[other] = a, b * (norm / (b @ a).norm())
        out.mkdir(exist_ok=True)
        save_file(tensors, out / name)
        config = (adapter / "adapter_config.json").read_text()
        (out / "adapter_config.json").write_text(config)
        return out

    def lora(self, row: str, samples: int, seed: int) -> dict[str, Any]:
        """A new adapter on the samples that a fit of this seed trains on, one in each step."""
        _, rank, how = row.split("-")
        options = self.options_of(samples, seed, self.adapters, out=self.folder / "none.json")
        fit = collection_of(plan_fit(options))
        train, held = fit.train.batches, fit.held.batches
        key = "/".join(map(str, (self.options.steps, self.unseen or "known", samples, seed)))
        of_fit = self.done.get(f"{key}/module", {})
        epochs = 1 if how == "data" else round(of_fit.get("passes", 40))
        torch.manual_seed(seed)
        config = LoraConfig(r=int(rank), lora_alpha=2 * int(rank), target_modules="all-linear",
                            task_type="CAUSAL_LM")  # fmt: skip
        adapted = get_peft_model(self.model, config)
        trained = [p for p in adapted.parameters() if p.requires_grad]
        rate = languages.LEARNING_RATE / (1 if how == "data" else 4)  # of several passes better
        optimizer = torch.optim.AdamW(trained, lr=rate)
        best, kept, found = float("inf"), 0, {}
        rows = [{k: v[n : n + 1] for k, v in batch.inputs.items()}
                for batch in train for n in range(len(batch.weights))]  # fmt: skip
        for epoch in range(1, epochs + 1):
            for number in torch.randperm(len(rows)).tolist():
                loss = adapted(**rows[number]).loss
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            with torch.no_grad():
                now = statistics.fmean(float(adapted(**b.inputs).loss) for b in held)
            if now < best or how == "data":
                best, kept, found = now, epoch, lossy.losses(adapted, self.test)
            if epoch - kept >= 5:  # it has been getting worse
                break
        self.model = adapted.unload()
        return {"test": found, "epochs": kept}


def show(done: dict[str, dict]) -> None:
    """A table for each run of adapters and language: rows by the numbers of samples, the mean over
    seeds of the mean test loss; how much more a fit gains on its training part than on what it
    holds out, the mean of all."""
    runs = dict.fromkeys("/".join(key.split("/")[:2]) for key in done)
    for run in runs:
        own = {tuple(key.split("/")[2:]): its for key, its in done.items()
               if key.startswith(f"{run}/")}  # fmt: skip
        counts = sorted({int(samples) for samples, _, _ in own} - {0})
        steps, language = run.split("/")
        print(f"\nadapters of {steps} steps, {language} languages, nats per token:\n")
        print(f"| | {' | '.join(f'{n} samples' for n in counts)} | gain on train - held out |")
        print("|---" * (2 + len(counts)) + "|")
        for row in ROWS:
            cells, gaps = [], []
            for count in counts:
                its = [one for (n, _, name), one in own.items()
                       if name == row and int(n) in (0, count)]  # fmt: skip
                means = [statistics.fmean(one["test"].values()) for one in its]
                cells.append(f"{statistics.fmean(means):.3f}" if means else "")
                gaps += [one["train"] - one["held"] for one in its if one.get("train")]
            gap = f"{statistics.fmean(gaps):.3f}" if gaps else ""
            if any(cells):
                print(f"| {row} | {' | '.join(cells)} | {gap} |")


if __name__ == "__main__":
    sys.exit(main())

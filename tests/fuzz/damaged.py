"""Random damage to checkpoints of random tiny models, and what transformers' loader says of it."""

import collections
import random
import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from adapterkit.core.checkpoint.folder import LocalFolder
from adapterkit.core.checkpoint.spec import open_checkpoint
from adapterkit.core.errors import Refused
from adapterkit.core.weights.loading import gaps_of, looks_whole
from adapterkit.core.weights.skeleton import tied_names
from tests.fuzz import models
from tests.support.oracle import quiet

Tensors = dict[str, torch.Tensor]


@dataclass
class Outcome:
    """What came of one damaged checkpoint."""

    damage: str
    wrong: list[str] = field(default_factory=list)
    found: int = 0  # gaps that both sides name
    unusable: str | None = None


def _without(tensors: Tensors, drop) -> Tensors:
    return {key: tensor for key, tensor in tensors.items() if not drop(key)}


def lost_weight(tensors: Tensors, rng: random.Random) -> Tensors:
    lost = rng.choice(sorted(tensors))
    return _without(tensors, lambda key: key == lost)


def renamed_weight(tensors: Tensors, rng: random.Random) -> Tensors:
    name = rng.choice(sorted(tensors))
    new = name.replace(".", "_", 1) if rng.random() < 0.5 else f"{name}_old"
    return {new if key == name else key: tensor for key, tensor in tensors.items()}


def lost_layer(tensors: Tensors, rng: random.Random) -> Tensors:
    layers = sorted({m[0] for key in tensors for m in re.finditer(r"^.*?\.\d+\.", key)})
    lost = rng.choice(layers) if layers else "\0"
    return _without(tensors, lambda key: key.startswith(lost))


def prefixed(tensors: Tensors, rng: random.Random) -> Tensors:
    prefix = rng.choice(["base_model.model.", "module.", "_orig_mod."])
    return {prefix + key: tensor for key, tensor in tensors.items()}


def lost_part(tensors: Tensors, rng: random.Random) -> Tensors:
    """A head, an embedding, a tower: all that begins with one name."""
    parts = sorted({key.partition(".")[0] for key in tensors})
    lost = rng.choice(parts)
    return _without(tensors, lambda key: key.partition(".")[0] == lost)


def turned(tensors: Tensors, rng: random.Random) -> Tensors:
    matrices = [k for k, t in tensors.items() if t.dim() == 2 and t.shape[0] != t.shape[1]]
    if not matrices:
        return tensors
    key = rng.choice(sorted(matrices))
    return tensors | {key: tensors[key].T.contiguous()}


def sound(tensors: Tensors, rng: random.Random) -> Tensors:
    return tensors


DAMAGES = (sound, lost_weight, renamed_weight, lost_layer, prefixed, lost_part, turned)


def run(kind: str, seed: int, folder: Path, damages=DAMAGES) -> list[Outcome]:
    """Every kind of damage to one random model."""
    rng = random.Random(f"{kind} {seed}")
    try:
        base = models.save_base(kind, rng, folder)
    except models.Unusable as error:
        return [Outcome("", unusable=str(error))]
    files = sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        return [Outcome("", unusable="sharded")]
    tensors, outcomes = load_file(files[0]), []
    for damage in damages:
        left = damage(dict(tensors), rng) or {"none": torch.zeros(1)}
        save_file(left, files[0], metadata={"format": "pt"})
        outcomes.append(_judged(base, damage.__name__))
    return outcomes


def _judged(base: models.Base, damage: str) -> Outcome:
    outcome = Outcome(damage)
    checkpoint = open_checkpoint(LocalFolder(base.folder))
    try:
        gaps = gaps_of(checkpoint)
    except Refused as error:  # a model that transformers does not build from its config alone
        return Outcome(damage, unusable=f"no gaps known: {error.problem}")
    try:
        with quiet():
            model, info = base.cls.from_pretrained(
                base.folder, output_loading_info=True, ignore_mismatched_sizes=True, dtype="auto"
            )
    except Exception as error:  # the loader gives up: what it says has no names
        if not gaps.errors():
            outcome.wrong.append(f"no gap, and from_pretrained: {type(error).__name__}: {error}")
        outcome.found += 1
        return outcome
    state, tied = model.state_dict(), tied_names(model)
    for what, mine, theirs in (
        ("missing", gaps.missing, info["missing_keys"]),
        ("misshapen", gaps.misshapen, [name for name, *_ in info["mismatched_keys"]]),
    ):
        ours = {_first(name, tied) for name in mine}
        loader = {_first(n, tied) for n in theirs if state[n].is_floating_point()}
        outcome.found += len(ours & loader)
        for name in sorted(ours ^ loader):
            whose = "adapterkit" if name in ours else "from_pretrained"
            outcome.wrong.append(f"{damage}: {name} {what} by {whose} alone")
    if gaps.failed:
        outcome.wrong.append(f"{damage}: {sorted(gaps.failed)} cannot be converted, and loads")
    if gaps.holes and looks_whole(checkpoint):
        outcome.wrong.append(f"{damage}: looks whole, and {gaps.holes[0]} is missing")
    return outcome


def _first(name: str, tied: dict) -> str:
    return min((name, *tied.get(name, ())))


def run_all(kinds, seeds) -> collections.Counter:
    """Counts of many runs; what is wrong is printed."""
    counts: collections.Counter = collections.Counter()
    for seed in seeds:
        for kind in kinds:
            with tempfile.TemporaryDirectory() as folder:
                outcomes = run(kind, seed, Path(folder))
            for outcome in outcomes:
                counts["unusable" if outcome.unusable else outcome.damage] += 1
                if outcome.unusable and outcome.damage:
                    print(f"{kind} {seed}: {outcome.unusable}", flush=True)
                counts["gaps"] += outcome.found
                counts["wrong"] += bool(outcome.wrong)
                if outcome.wrong:
                    print(f"{kind} {seed}", *outcome.wrong[:4], sep="\n   ", flush=True)
    return counts

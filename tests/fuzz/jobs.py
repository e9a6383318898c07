"""One random job from its seed: a model, adapters, and what every verb makes of them."""

import random
import re
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import transformers

import adapterkit
from adapterkit.core.errors import AdapterkitError
from tests.support.oracle import quiet, stored

from . import adapters as drawn
from . import effective, models

# of a value: half a unit in the last place of bf16, a few of fp32
STEP = {"fp32": 2.0**-21, "bf16": 2.0**-8}
# What may be refused, and why that is right. Every refusal of a random job must be one of these.
JUDGED = (
    ("two adapters that bring the same trained value", r"is replaced by both"),
    ("DoRA and another adapter: the order decides", r"DoRA of .* and another adapter"),
    ("PEFT cannot merge such a bias either", r"a bias for .*, which has none in the base"),
    ("trained values are values, not additions", r"with weight .*these are values, not additions"),
    (
        "PEFT has no such bias on embeddings and parameters",
        r"together with biases of b \(lora_bias\)",
    ),
    (
        "PEFT cannot load a head beside rows of its tied embedding",
        r"token_adapter.base_layer|modules_to_save.default",
    ),
    (
        "PEFT cannot load a module that is a target and has one",
        r"is a target itself in .* and has target_parameters",
    ),
    (
        "PEFT cannot load rows and factors of one embedding",
        r"trained token rows of .* with factors of the same module",
    ),
    (
        "attention's output adapted twice over",
        r"attention\S*out_proj.lora_[AB].weight name the same tensor",
    ),
    (
        "PEFT cannot load a saved module inside one whose parameters are targets",
        r"modules_to_save .* inside .* parameters are targets",
    ),
    ("a parameter without elements", r"factors of .* with shapes .*\(0, |'shape': \[0, "),
    (
        "layers that transformers stores fused have no codes of their own",
        r"is stored in another layout than the model's",
    ),
    ("code that ties whatever the config says", r"cannot be untied: this model's code"),
    (
        "one row of an embedding trained by two adapters",
        r"a token row trained by two adapters|trained different token rows",
    ),
    (
        "a DoRA's delta needs the base's weights and a rank",
        r"exact result does not work with DoRA|DoRA of .* its delta depends on the base's weights",
    ),
    (
        "PEFT's factors do nothing where the code reads the weight",
        r"reads itself: PEFT's have no effect",
    ),
    ("PEFT's act after what an embedding looks up", r"with a forward of its own, which PEFT's"),
    ("trained values of two adapters, weights that are no shares", r"fully trained by"),
)


def unjudged(
    outcome: "Outcome", judged: Sequence[tuple[str, str]] = JUDGED
) -> list[tuple[str, str]]:
    """Refusals that nobody has called right."""
    return [
        (verb, text)
        for verb, text in outcome.refusals
        if not any(re.search(pattern, text, re.S) for _, pattern in judged)
    ]


@dataclass
class Outcome:
    """What a job was and what came of it."""

    kind: str
    seed: int
    jobs: list[str] = field(default_factory=list)  # verbs whose result was right
    refusals: list[tuple[str, str]] = field(default_factory=list)  # (verb, message)
    wrong: list[str] = field(default_factory=list)
    unusable: str | None = None
    forward: bool = False  # whether the whole model's outputs were compared
    untrainable: list[str] = field(default_factory=list)  # configurations that PEFT turned down
    without_oracle: str | None = None  # PEFT cannot load the adapters together
    settings: list[dict] = field(default_factory=list)


def counts(outcome: Outcome) -> Counter:
    """What is counted of many."""
    others = {
        "outputs compared": outcome.forward,
        "without oracle": outcome.without_oracle is not None,
    }
    return Counter(outcome.jobs) + Counter(others)


def run(kind: str, seed: int, folder: Path) -> Outcome:
    """Draw the job `seed` of a model type, do it, and compare."""
    outcome = Outcome(kind, seed)
    rng = random.Random(f"{kind}/{seed}")
    try:
        base = models.save_base(kind, rng, folder / "base")
    except models.Unusable as error:
        outcome.unusable = str(error)
        return outcome
    paths, weights = _adapters(base, rng, folder, outcome)
    if not paths:
        outcome.unusable = "PEFT trains none of the configurations"
        return outcome
    _merge(base, paths, weights, rng, folder, outcome)
    if len(paths) > 1 and outcome.without_oracle is None:
        _combine(base, paths, weights, folder, outcome)
    if rng.random() < 0.3:
        _quantize(base, paths, weights, rng, folder, outcome)
    if (folder / "merged").exists() and outcome.without_oracle is None and rng.random() < 0.4:
        _extract(base, folder, outcome)
    return outcome


def _adapters(
    base: models.Base, rng: random.Random, folder: Path, outcome: Outcome
) -> tuple[list[Path], list[float]]:
    paths, weights = [], []
    count = rng.choice([1, 1, 1, 2, 2, 3])
    for attempt in range(4 * count):
        if len(paths) == count:
            break
        model = base.load()
        config = drawn.config_for(model, base.task, rng)
        if count > 1:
            # PEFT loads the trained biases of a second adapter under names that it has renamed
            config["bias"] = "none"
            # and passes by what another adapter adds inside a saved module
            config.pop("modules_to_save", None)
        if paths and rng.random() < 0.85:
            drawn.keep_factors(config)  # two adapters' trained values have no sum
        path = folder / f"adapter{attempt}"
        try:
            drawn.train(model, config, path, rng.randrange(2**31))
        except drawn.Untrainable as error:
            outcome.untrainable.append(str(error))
            continue
        paths.append(path)
        outcome.settings.append(config)
        whole = drawn.has_values(config) and rng.random() < 0.95
        weights.append(1.0 if whole or rng.random() < 0.6 else rng.choice([0.5, -1.0, 0.3, 2.0]))
    return paths, weights


def tried(outcome: Outcome, verb: str, call: Callable[[], object]) -> bool:
    """Whether a verb did its job; a refusal is noted, anything else is a bug."""
    try:
        with quiet():
            call()
    except AdapterkitError as error:
        outcome.refusals += [(verb, str(one)) for one in getattr(error, "errors", (error,))]
        return False
    except Exception as error:  # a traceback is a bug whatever its type
        outcome.wrong.append(f"{verb}: {type(error).__name__}: {error}")
        return False
    return True


def reference(base: models.Base, paths: list[Path], weights: list[float], outcome: Outcome):
    """PEFT's model with all adapters active; None where PEFT cannot hold them together, or loses
    some of their keys."""
    try:
        return _held_by_peft(base, paths, weights)
    except Exception as error:  # PEFT's own limits have every type
        outcome.without_oracle = f"{type(error).__name__}: {error}"
        return None


def _held_by_peft(base: models.Base, paths: list[Path], weights: list[float]):
    """PEFT's model of these adapters; `ValueError` where its loader says that keys were missing or
    left over."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        wrapped = drawn.weighted(base.load(), paths, weights)
    lost = [
        str(w.message)
        for w in caught
        if re.search("missing adapter keys|nexpected key", str(w.message))
    ]
    if lost:
        raise ValueError(lost[0][:300])
    return wrapped


def _merge(
    base: models.Base,
    paths: list[Path],
    weights: list[float],
    rng: random.Random,
    folder: Path,
    outcome: Outcome,
) -> None:
    out = folder / "merged"
    sources = [f"{path}={weight}" for path, weight in zip(paths, weights, strict=True)]
    if not tried(
        outcome, "merge", lambda: adapterkit.merge(base.folder, sources, out=out, verify=True)
    ):
        return
    wrapped = reference(base, paths, weights, outcome)
    if wrapped is None:
        return
    try:
        with quiet():
            merged, info = base.cls.from_pretrained(out, output_loading_info=True, dtype="auto")
    except Exception as error:  # whatever the loader says of a folder that it cannot use
        outcome.wrong.append(f"merge: transformers cannot load the result: {error}")
        return
    lost = {
        k: sorted(info[k])
        for k in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if info[k]
    }
    if lost:
        outcome.wrong.append(f"merge: {lost}")
        return
    wrong, outcome.forward = effective.differences(
        wrapped, merged.eval(), base.load(), STEP[base.dtype]
    )
    outcome.wrong += [f"merge: {text}" for text in wrong]
    if not wrong:
        outcome.jobs.append("merge")


def _combine(
    base: models.Base, paths: list[Path], weights: list[float], folder: Path, outcome: Outcome
) -> None:
    out = folder / "combined"
    sources = [f"{path}={weight}" for path, weight in zip(paths, weights, strict=True)]
    if not tried(
        outcome,
        "combine",
        lambda: adapterkit.combine(sources, base=base.folder, out=out, method="linear"),
    ):
        return
    wrapped = reference(base, paths, weights, outcome)
    loaded = _loaded("combine", base, out, outcome)
    if wrapped is None or loaded is None:
        return
    wrong, _ = effective.differences(wrapped, loaded, base.load(), 2.0**-20)
    outcome.wrong += [f"combine: {text}" for text in wrong]
    outcome.jobs += [] if wrong else ["combine"]


def _extract(base: models.Base, folder: Path, outcome: Outcome) -> None:
    out = folder / "extracted"
    if not tried(
        outcome,
        "extract",
        lambda: adapterkit.extract(base.folder, folder / "merged", rank=4096, out=out),
    ):
        return
    if not (out / "adapter_model.safetensors").exists():
        return
    with quiet():
        tuned = base.cls.from_pretrained(folder / "merged", dtype="auto").eval()
    loaded = _loaded("extract", base, out, outcome)
    if loaded is not None:
        wrong, _ = effective.differences(tuned, loaded, base.load(), 2.0**-15)
        outcome.wrong += [f"extract: {text}" for text in wrong]
        outcome.jobs += [] if wrong else ["extract"]


def _quantize(
    base: models.Base,
    paths: list[Path],
    weights: list[float],
    rng: random.Random,
    folder: Path,
    outcome: Outcome,
) -> None:
    """The base in 4 or 8 bits: the tensors that transformers saves; and a merge into it, as floats,
    against PEFT on what it decodes to."""
    to, double = rng.choice(["nf4", "fp4", "int8"]), rng.random() < 0.5
    out, floats, merged = folder / "quantized", folder / "decoded", folder / "merged-floats"
    double = double and to != "int8"
    if not tried(
        outcome,
        "quantize",
        lambda: adapterkit.quantize(base.folder, out=out, to=to, double_quant=double),
    ):
        return
    theirs = _quantized_by_transformers(base, to, double, folder / "theirs")
    if theirs is not None:
        ours = stored(out)
        odd = sorted(
            k
            for k in {*ours, *theirs}
            if k not in ours or k not in theirs or not _same(ours[k], theirs[k])
        )
        if odd:
            outcome.wrong.append(
                f"quantize --to {to}: {len(odd)} tensors differ from transformers': {odd[:3]}"
            )
            return
        outcome.jobs.append("quantize")
    if not tried(
        outcome, "dequantize", lambda: adapterkit.dequantize(out, out=floats, dtype="fp32")
    ):
        return
    sources = [f"{path}={weight}" for path, weight in zip(paths, weights, strict=True)]
    options = {"dequantize": True, "dtype": "fp32", "verify": True}
    if not tried(
        outcome, "merge --dequantize", lambda: adapterkit.merge(out, sources, out=merged, **options)
    ):
        return
    decoded = replace(base, folder=floats)
    wrapped = reference(decoded, paths, weights, outcome)
    if wrapped is None:
        return
    actual = replace(base, folder=merged).load()
    wrong, _ = effective.differences(wrapped, actual, decoded.load(), STEP["fp32"])
    outcome.wrong += [f"merge --dequantize: {text}" for text in wrong]
    outcome.jobs += [] if wrong else ["merge --dequantize"]


def _same(a, b) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
    )


def _quantized_by_transformers(base: models.Base, to: str, double: bool, folder: Path):
    """The tensors that transformers and bitsandbytes save; None where they cannot."""
    settings = (
        {"load_in_8bit": True}
        if to == "int8"
        else {"load_in_4bit": True, "bnb_4bit_quant_type": to}
    )
    if double:
        settings["bnb_4bit_use_double_quant"] = True
    try:
        with quiet():
            config = transformers.BitsAndBytesConfig(**settings)
            model = base.cls.from_pretrained(
                base.folder, quantization_config=config, dtype="auto", device_map="cpu"
            )
            model.save_pretrained(folder)
            _, info = base.cls.from_pretrained(folder, device_map="cpu", output_loading_info=True)
            if info["missing_keys"] or info["unexpected_keys"]:
                return None
    except Exception:  # models that its quantizer, or its saving of quantized ones, does not know
        return None
    return stored(folder)


def _loaded(verb: str, base: models.Base, adapter: Path, outcome: Outcome):
    """PEFT's model of a written adapter, with every key used."""
    try:
        return _held_by_peft(base, [adapter], [1.0])
    except Exception as error:  # whatever PEFT says of a file that it cannot use
        outcome.wrong.append(
            f"{verb}: PEFT cannot load the result: {type(error).__name__}: {error}"
        )
        return None

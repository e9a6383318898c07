"""One random adapter on a live model, from its seed: outputs, gradients, merging and files against
PEFT's forward, in float64."""

import copy
import json
import random
import re
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, cast

import peft
import torch
from diffusers.training_utils import EMAModel
from peft.tuners.lora.layer import MultiheadAttention
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor, nn
from transformers import Trainer

from adapterkit.core.adapter.config import TASK_HEADS
from adapterkit.core.adapter.keys import CONFIG
from adapterkit.core.inputs.weights_file import NamedAdapter, WeightsFile, write_weights
from adapterkit.runtime import Adapters, attach, load
from adapterkit.runtime.patches.factors import FactorsPatch
from adapterkit.verbs.shared.lora_config import LoraConfig
from tests.support.beside_peft import JUNK, parameters_of
from tests.support.oracle import stored

from . import adapters as drawn
from . import effective, jobs, models
from .jobs import Outcome

CLOSE = 1e-6  # of a tensor's largest value, in float64: factors are float32 in PEFT's files
# What may be refused on a live model, and why that is right.
JUDGED = (
    *jobs.JUDGED,
    ("PEFT's factors do nothing there", r"is read by .*, not by its forward|that do nothing: "),
    ("PEFT's factors act after what is looked up", r"with a forward of its own"),
    ("no weight equals the part", r"cannot be merged into "),
    ("layers without a target", r"layers: no target in layer"),
    ("no ties to keep", r"tie = True"),
    ("PEFT keeps the sides one while they train", r"dora with tie on "),
    ("a pattern for nothing", r"(rank|alpha)_pattern: .* matches none"),
    (
        "PEFT's all-linear adds the experts' names where no layer has any",
        r"parameters: '(down_proj|gate_up_proj|gate\.weight)' matches none",
    ),
    ("PEFT saves an attention's output projection twice", r"out_proj\..* name the same tensor"),
    ("the code does more by the switch than tie", r"more with tie_word_embeddings than tie"),
)


counts, unjudged = jobs.counts, partial(jobs.unjudged, judged=JUDGED)


class Wide(models.Base):
    """A base that is read in float32: PEFT would round what it trains besides factors."""

    def load(self, dtype: torch.dtype | str = torch.float32) -> Any:
        model = super().load(dtype)
        model.config._experts_implementation = "eager"  # grouped products know no float64
        return model


def run(kind: str, seed: int, folder: Path) -> Outcome:
    """Draw an adapter `seed` of a model type, load and attach it, and compare."""
    outcome = Outcome(kind, seed)
    rng = random.Random(f"live/{kind}/{seed}")
    try:
        base = models.save_base(kind, rng, folder / "base")
    except models.Unusable as error:
        outcome.unusable = str(error)
        return outcome
    base = Wide(base.folder, base.cls, base.task, "fp32")
    for attempt in range(5):
        config = drawn.config_for(base.load(), base.task, rng)
        if rng.random() < 0.25:
            config["bias"], config["lora_bias"] = "all", False
        _sharpen(config, base.load(), random.Random(f"live/{kind}/{seed}/{attempt}"))
        try:
            path = folder / f"adapter{attempt}"
            still = partial(_without_gradient, plain=base.load())
            if rng.random() < 0.15:
                still = lambda wrapped: ()  # as no training with PEFT leaves it
            drawn.train(base.load(), config, path, rng.randrange(2**31), still)
        except drawn.Untrainable as error:
            outcome.untrainable.append(str(error))
            continue
        outcome.settings.append(config)
        _compare(base, path, outcome)
        return outcome
    outcome.unusable = "PEFT trains none of the configurations"
    return outcome


def _sharpen(config: dict[str, Any], model: Any, rng: random.Random) -> None:
    """Short names of modules that are trained in full, and DoRA with dropout and trained biases."""
    if rng.random() < 0.25:
        kinds = (nn.Linear, nn.Embedding)
        own = [n for n, m in model.named_modules() if n and not isinstance(m, kinds)]
        names = [n for n in own if any(p.dim() for p in model.get_submodule(n).parameters(False))]
        if names:
            end = rng.choice(names).rpartition(".")[2]
            short = end[-rng.randint(min(3, len(end)), len(end)) :]
            config["modules_to_save"] = [*(config.get("modules_to_save") or ()), short]
    if rng.random() < 0.3 and not config.get("target_parameters"):
        config |= {"use_dora": True, "lora_bias": False, "lora_dropout": 0.4}
        config["bias"] = rng.choice(["none", "lora_only", "all"])


def _without_gradient(wrapped: nn.Module, plain: Any) -> list[nn.Parameter]:
    """What PEFT's training would leave as it starts."""
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    _backward(wrapped, plain)
    still = [p for p in trained if p.grad is None]
    wrapped.zero_grad()
    return [] if len(still) == len(trained) else still


def _backward(model: nn.Module, plain: Any) -> bool:
    """Compute the gradients of a loss; whether there is one."""
    outputs = models.outputs(model, plain, gradients=True) or {}
    finite = [y for y in outputs.values() if bool(y.isfinite().all()) and y.requires_grad]
    if finite:
        torch.stack([y.square().mean() for y in finite]).sum().backward()
    return bool(finite)


def _compare(base: models.Base, path: Path, outcome: Outcome) -> None:
    def plain() -> Any:
        return base.load().double()  # XLNet read in float64 has no forward

    theirs = jobs.reference(base, [path], [1.0], outcome)
    if theirs is None:
        return
    theirs = theirs.double()
    model = plain()
    expected = models.outputs(theirs, model)
    runs = expected is not None  # else PEFT's forward fails, and tells nothing
    if any(effective.ignored(m) or _loses_bias(m) for m in theirs.modules()):
        expected = None  # PEFT's own forward goes past the adapter, or the base's bias
    before = models.outputs(model, model)
    adapters = _tried(
        outcome, "load", lambda: load(model, path, trainable=True, dtype=torch.float64)
    )
    if adapters is None:
        _note(outcome, "refused", _equal(models.outputs(model, model), before, 0.0))
        return
    actual = models.outputs(model, model)
    outcome.forward = expected is not None
    _note(outcome, "load", _equal(actual, expected, CLOSE))
    if runs and _has_gradients(theirs, model):
        _note(outcome, "gradients", _gradients(adapters, theirs, model))
    _note(outcome, "groups", _groups(adapters, theirs))
    _note(outcome, "EMA", _average(adapters, actual))
    dropout = next(iter(adapters.state.adapters.values())).config.dropout
    if dropout and expected is not None:
        _note(outcome, "training", _training(plain(), path, theirs))
    _note(outcome, "disabled", _disabled(adapters, before))
    _merge(adapters, actual, outcome)
    _go_round(adapters, path.parent / "weights.json", outcome)
    if runs:
        _save(base, adapters, actual, path.parent / "saved", outcome)
    _attach(plain(), path, outcome)


def _tried(outcome: Outcome, verb: str, call: Callable[[], Any]) -> Any:
    """What a call gives; None where it is refused, or fails."""
    results: list[Any] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        jobs.tried(outcome, verb, lambda: results.append(call()))
    return results[0] if results else None


def _note(outcome: Outcome, job: str, problem: str | None) -> None:
    if problem is None:
        outcome.jobs.append(job)
    else:
        outcome.wrong.append(f"{job}: {problem}")


def _equal(
    actual: dict[str, Tensor] | None, expected: dict[str, Tensor] | None, tolerance: float
) -> str | None:
    """The first output that differs by more than a share of its largest value; None for none."""
    for key, output in (expected or {}).items():
        result = (actual or {}).get(key)
        if not bool(output.isfinite().all()):
            continue  # masked scores, and models that random weights drive to infinity
        if result is None or result.shape != output.shape:
            return f"output {key} is missing"
        largest = float(output.abs().max()) + 1e-3
        if not float((result - output).abs().max()) <= tolerance * largest:
            return f"output {key} off by {float((result - output).abs().max()) / largest:.3g}"
    return None


def _has_gradients(theirs: Any, plain: nn.Module) -> bool:
    """Whether PEFT's model has gradients of a loss; it has them from then on. It puts other weights
    into torch's attention before the backward pass."""
    if any(isinstance(module, MultiheadAttention) for module in theirs.modules()):
        return False
    theirs.zero_grad()
    try:
        return _backward(theirs, plain)
    except RuntimeError:
        return False  # models that change in place what their own gradients need


def _gradients(adapters: Adapters, theirs: Any, plain: nn.Module) -> str | None:
    """Where the gradients of a loss differ from PEFT's, by the keys of the file."""
    found = []
    adapters.model.zero_grad()
    _backward(adapters.model, plain)
    state, name = theirs.state_dict(keep_vars=True), next(iter(theirs.peft_config))
    others = peft.get_peft_model_state_dict(theirs, state_dict=state, adapter_name=name)
    ours, config = parameters_of(adapters), next(iter(adapters.state.adapters.values())).config
    if odd := _odd(ours, others, config.bias):
        found.append(f"keys {odd[:3]}")
    close = CLOSE * (100 if config.dora else 10)  # DoRA's norms are float32
    sizes = [float(x.grad.abs().max()) for x in others.values() if x.grad is not None]
    for key in ours.keys() & others.keys():
        both = ours[key], others[key]
        if not all(x.requires_grad and x.is_leaf for x in both):
            continue  # what is not trained, and experts, whose file has another layout
        actual, expected = (torch.zeros(()) if x.grad is None else x.grad for x in both)
        # some are zeros but for rounding: a key's bias is the same for all that is attended to
        largest = float(expected.abs().max()) + 1e-3 * max(sizes) + 1e-9
        if not float((actual - expected).abs().max()) <= close * largest:
            found.append(f"{key} off by {float((actual - expected).abs().max()) / largest:.3g}")
    return "; ".join(found[:3]) or None


def _loses_bias(module: nn.Module) -> bool:
    """Whether PEFT computes a head with trained rows without its bias, until it merges."""
    is_rows = isinstance(module, TrainableTokensWrapper)
    return is_rows and getattr(module.original_module, "bias", None) is not None


def _training(model: Any, path: Path, theirs: Any) -> str | None:
    """Where outputs or gradients differ with the same dropout."""
    adapters = load(model, path, trainable=True, dtype=torch.float64)
    theirs, plain = copy.deepcopy(theirs).train(), copy.deepcopy(model)
    model.train()
    expected, again = (models.outputs(theirs, plain) for _ in range(2))
    if _equal(again, expected, CLOSE):
        return None  # what it draws besides, or keeps, is no part of this
    # DoRA's norms are float32, and f - 1 with dropout has what they lose
    problem = _equal(models.outputs(model, plain), expected, CLOSE * 10)
    if problem or not _has_gradients(theirs, plain):
        return problem
    return _gradients(adapters, theirs, plain)


def _go_round(adapters: Adapters, path: Path, outcome: Outcome) -> None:
    """Weights of modules act as before where `active` is given again, and where it is merged."""
    ((name, adapter),) = adapters.state.adapters.items()
    model, rng = adapters.model, random.Random(len(outcome.jobs))
    modules = {
        part.named(s.path) for s, part in adapter.patches() if isinstance(part, FactorsPatch)
    }
    chosen = {module: (round(rng.uniform(-1, 2), 2),) for module in modules if rng.random() < 0.7}
    write_weights(WeightsFile((NamedAdapter("one"),), (0.5,), chosen), path)
    adapters.activate(name, weights=path)
    actual = models.outputs(model, model)
    adapters.activate(adapters.active)
    _note(outcome, "weights", _equal(models.outputs(model, model), actual, 1e-12))
    _tried(outcome, "merge", lambda: adapters.merge(adapters.active))
    if adapters.merged:
        _note(outcome, "weights", _equal(models.outputs(model, model), actual, CLOSE))
        adapters.unmerge()
        _note(outcome, "weights", _equal(models.outputs(model, model), actual, 1e-12))
    adapters.activate(name)


def _odd(ours: Iterable[str], theirs: Iterable[str], bias: str) -> list[str]:
    """Keys that one side has, but for values of the base that PEFT saves with an embedding."""
    rows = r"|token_adapter\.base_layer\.bias$" * (bias != "all")
    junk = re.compile(JUNK.pattern + r"|base_layer\.bias$" * (bias == "none") + rows)
    return sorted(key for key in {*ours} ^ {*theirs} if not junk.search(key))


def _disabled(adapters: Adapters, before: dict[str, Tensor] | None) -> str | None:
    with adapters.disabled():
        return _equal(models.outputs(adapters.model, adapters.model), before, 1e-12)


def _groups(adapters: Adapters, theirs: Any) -> str | None:
    """What decays in one of the models alone, by the keys of the file."""
    decayed = []
    state, name = theirs.state_dict(keep_vars=True), next(iter(theirs.peft_config))
    others = peft.get_peft_model_state_dict(theirs, state_dict=state, adapter_name=name)
    for model, values in ((adapters.model, parameters_of(adapters)), (theirs, others)):
        names = {*Trainer.get_decay_parameter_names(cast(Any, None), model)}
        own = {id(p) for name, p in model.named_parameters() if name in names}
        keys = {key: id(p) in own for key, p in values.items() if p.requires_grad}
        decayed.append(keys)
    ours, others = decayed
    odd = [key for key in ours.keys() & others.keys() if ours[key] != others[key]]
    return f"{odd[:3]} decay in one alone" if odd else None


def _average(adapters: Adapters, actual: dict[str, Tensor] | None) -> str | None:
    """Averages act while they are there, and the weights of training after them."""
    own, model = list(adapters.parameters()), cast(Any, adapters.model)
    if not own:
        return None
    shadows = EMAModel(own)
    shadows.shadow_params = [1.5 * shadow for shadow in shadows.shadow_params]
    shadows.store(own)
    shadows.copy_to(own)
    expected = models.outputs(twin := copy.deepcopy(model), twin)
    problem = _equal(models.outputs(model, model), expected, 1e-12)
    shadows.restore(own)
    return problem or _equal(models.outputs(model, model), actual, 1e-12)


def _merge(adapters: Adapters, actual: dict[str, Tensor] | None, outcome: Outcome) -> None:
    """Merged outputs are those before, and so are those after unmerging, bit for bit."""
    _tried(outcome, "merge", adapters.merge)
    if not adapters.merged:
        return
    model = adapters.model
    _note(outcome, "merge", _equal(models.outputs(model, model), actual, CLOSE))
    adapters.unmerge()
    _note(outcome, "unmerge", _equal(models.outputs(model, model), actual, 1e-12))
    adapters.merge()
    model.float()
    adapters.unmerge()
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()} - {torch.float32}
    _note(outcome, "cast", f"{dtypes} after unmerging in float32" if dtypes else None)
    model.double()
    _note(outcome, "cast back", _equal(models.outputs(model, model), actual, 1e-4))


def _save(
    base: models.Base,
    adapters: Adapters,
    actual: dict[str, Tensor] | None,
    folder: Path,
    outcome: Outcome,
) -> None:
    """PEFT reads what `save` writes, and gives the same outputs."""
    adapters.save(folder)
    again = jobs.reference(base, [folder], [1.0], outcome)
    if again is None:
        outcome.wrong.append(f"save: PEFT cannot read it: {outcome.without_oracle}")
        return
    again = again.double()
    if not any(effective.ignored(m) or _loses_bias(m) for m in again.modules()):
        outputs = models.outputs(again, base.load().double())
        _note(outcome, "save", _equal(outputs, actual, CLOSE))


def _attach(model: nn.Module, path: Path, outcome: Outcome) -> None:
    """A new adapter of the same settings trains what PEFT's does: the keys of its file."""
    settings = json.loads((path / CONFIG).read_text())
    # PEFT adds all names that a head may have
    heads = {*TASK_HEADS.get(settings.get("task_type"), ())}
    settings["modules_to_save"] = [
        name for name in settings.get("modules_to_save") or () if name not in heads
    ] or None
    config = LoraConfig.from_peft(settings, "settings")
    adapters = _tried(outcome, "attach", lambda: attach(model, config))
    if adapters is None:
        return
    keys = parameters_of(adapters)
    odd = _odd(keys, stored(path), config.bias)
    if config.layers is not None:  # PEFT finds no layers whose names begin with their number
        odd = [key for key in odd if key not in keys]
    _note(outcome, "attach", f"keys {odd[:3]}" if odd else None)

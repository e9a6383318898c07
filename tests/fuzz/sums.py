"""Statistics of the layers of one random model: of its files, of the live model, as PEFT computes
them; held against plain hooks on the whole model in float64 while each text runs alone."""

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import calib_cov_distribution
from torch import Tensor, nn

from adapterkit.core.checkpoint.folder import LocalFolder
from adapterkit.core.checkpoint.spec import open_checkpoint
from adapterkit.core.errors import AdapterkitError
from adapterkit.core.weights.layers import is_linear
from adapterkit.runtime import collect
from tests.support.oracle import quiet
from tests.support.stored import collected

from . import models

WIDEST = 128  # inputs of layers whose principal components are compared
TEXTS = 8  # as many as a text has tokens at most: a transposed mask has the right size
TOLERANCE = {"live": 1e-5, "files": 2e-3}  # of the largest value; files run in float32
# refusals that are right, with the reason
JUDGED = (
    ("vectors of several tokens, of which some are padding", "is not known"),
    ("PEFT takes one row at a time", "as PEFT's preprocess_corda"),
)


@dataclass
class Outcome:
    """What was compared, and what was wrong."""

    kind: str
    seed: int
    unusable: str | None = None
    layers: int = 0  # that were compared, of both doors
    without_oracle: str | None = None
    linear: tuple[int, int] = (0, 0)  # layers that are found, modules of nn.Linear
    refusals: list[tuple[str, str]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def counts(outcome: Outcome) -> Counter:
    """What is counted of many."""
    return Counter(layers=outcome.layers, without_oracle=outcome.without_oracle is not None)


def unjudged(outcome: Outcome) -> list[tuple[str, str]]:
    """Refusals that nobody has called right."""
    return [one for one in outcome.refusals if not any(text in one[1] for _, text in JUDGED)]


def run(kind: str, seed: int, folder: Path) -> Outcome:
    """One random model of the type, and random padded texts."""
    outcome, rng = Outcome(kind, seed), random.Random(f"statistics {kind} {seed}")
    try:
        base = models.save_base(kind, rng, folder / "base")
        model = base.load(torch.float32)
    except models.Unusable as error:
        outcome.unusable = str(error)
        return outcome
    with quiet():
        model.save_pretrained(folder / "fp32")
    model = model.double()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # of which there are float64 kernels
    calls = _calls(model, rng)
    if calls is None:
        outcome.unusable = "no inputs of ours suit it"
        return outcome
    batch, rows = calls
    _compare(outcome, model, folder, batch, rows)
    return outcome


def _calls(
    model: nn.Module, rng: random.Random
) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]] | None:
    """A padded batch, and its texts one by one without padding."""
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    # some models pad to blocks by themselves
    step = 4 if hasattr(model.config, "attention_window") else 1
    lengths = [TEXTS, *(rng.randrange(step, TEXTS + 1, step) for _ in range(TEXTS - 1))]
    for inputs in models._inputs(model):
        batch = {
            key: value.repeat(TEXTS, *(1,) * (value.dim() - 1))[:TEXTS]
            for key, value in inputs.items()
        }
        for key in [key for key in batch if key.endswith("input_ids")]:
            ids = torch.randint(6, 40, (TEXTS, TEXTS), generator=generator)
            mask = torch.arange(TEXTS) < torch.tensor(lengths)[:, None]
            batch[key] = ids
            batch[key.replace("input_ids", "attention_mask")] = mask.long()
        batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
        rows = [_row(batch, number, length) for number, length in enumerate(lengths)]
        try:
            with torch.no_grad(), quiet():
                torch.manual_seed(0)
                model(**batch)
                model(**rows[-1])
        except Exception:  # a model that wants other inputs
            continue
        return batch, rows
    return None


def _row(batch: dict[str, Tensor], number: int, length: int) -> dict[str, Tensor]:
    row = {key: value[number : number + 1] for key, value in batch.items()}
    return {
        key: value[:, :length] if key.endswith(("input_ids", "attention_mask")) else value
        for key, value in row.items()
    }


def _compare(
    outcome: Outcome,
    model: nn.Module,
    folder: Path,
    batch: dict[str, Tensor],
    rows: list[dict[str, Tensor]],
) -> None:
    layers = {name: module for name, module in model.named_modules() if is_linear(module)}
    known = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    outcome.linear = len(layers), len(known)
    seen, together = (_inputs_of(model, layers, calls) for calls in (rows, [batch]))
    if seen is None or together is None:
        outcome.without_oracle = "a text alone fails"
        return
    # where padding changes what the others are, there is no oracle
    alone = {
        name: x
        for name, calls in seen.items()
        if _holds(x := _vectors(calls), _vectors(together[name]))
    }
    if len(alone) < len(seen):
        outcome.without_oracle = f"{len(seen) - len(alone)} layers: padding matters"
    what = ["covariance", "mean"]
    what += ["pca"] if all(x.shape[-1] <= WIDEST for x in alone.values()) else []
    try:
        live = collect(model, lambda: model(**batch), what=what)
    except AdapterkitError as error:
        outcome.refusals.append(("live", str(error)))
        live = {}
    _check(outcome, "live", live, alone, together)
    base = open_checkpoint(LocalFolder(folder / "fp32"))
    given = {k: v.float() if v.is_floating_point() else v for k, v in batch.items()}
    try:
        files = collected(base, [given], folder, what=what)
    except AdapterkitError as error:
        outcome.refusals.append(("files", str(error)))
        files = {}
    _check(outcome, "files", files, alone, together)
    seen = {name: calls for name, calls in seen.items() if f"{name}.mean" in live}
    _check_peft(outcome, model, layers, seen, rows)


def _inputs_of(
    model: nn.Module, layers: dict[str, nn.Module], calls: list[dict[str, Tensor]]
) -> dict[str, list[Tensor]] | None:
    """What each layer sees, call by call."""
    seen: dict[str, list[Tensor]] = {}

    def watch(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            seen.setdefault(name, []).append(x.detach().clone())

        return hook

    hooks = [m.register_forward_pre_hook(watch(n), with_kwargs=True) for n, m in layers.items()]
    try:
        with torch.no_grad(), quiet():
            for call in calls:
                torch.manual_seed(0)
                model(**call)
    except Exception:  # a text that is too short for the model
        return None
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _vectors(calls: list[Tensor]) -> Tensor:
    return torch.cat([x.reshape(-1, x.shape[-1]) for x in calls]).double()


def _check(
    outcome: Outcome,
    door: str,
    stats: dict[str, Tensor],
    alone: dict[str, Tensor],
    together: dict[str, list[Tensor]],
) -> None:
    tolerance = TOLERANCE[door]
    for key, value in stats.items():
        name, _, kind = key.rpartition(".")
        if kind not in ("covariance", "mean", "variances") or name not in alone:
            continue
        expected = _expected(alone[name], kind)[: len(value)]
        outcome.layers += kind == "covariance"
        apart = float((value - expected).abs().max() / expected.abs().max().clamp(1e-30))
        if not apart <= tolerance:
            shape = tuple(together[name][0].shape)
            outcome.wrong.append(f"{door} {key}: {apart:.1e} off, of {shape}")


def _expected(x: Tensor, kind: str) -> Tensor:
    mean = x.mean(0)
    if kind == "mean":
        return mean.float()
    if kind == "covariance":
        return (x.T @ x / len(x)).float()
    x = x - mean
    return torch.linalg.eigvalsh(x.T @ x / len(x)).flip(0).float()


def _holds(alone: Tensor, together: Tensor) -> bool:
    """Whether the vectors of texts alone are among those of the batch."""
    if len(together) < len(alone):
        return False
    apart = torch.cdist(alone, together, compute_mode="donot_use_mm_for_euclid_dist").amin(1)
    return bool((apart <= 1e-9 * alone.norm(dim=1).clamp(1e-12) + 1e-12).all())


def _check_peft(
    outcome: Outcome,
    model: nn.Module,
    layers: dict[str, nn.Module],
    seen: dict[str, list[Tensor]],
    rows: list[dict[str, Tensor]],
) -> None:
    """CorDA's covariance by PEFT's own hook, of a text after the other."""
    names = [
        name
        for name, calls in seen.items()
        if all(x.dim() == 3 and len(x) == 1 and x.shape[1] > 1 and float(x.max()) for x in calls)
    ][:6]
    if not names:
        return

    def run_model() -> None:
        with torch.no_grad(), quiet():
            for row in rows:
                torch.manual_seed(0)
                model(**row)

    config = LoraConfig(target_modules=names, init_lora_weights="corda", corda_config=CordaConfig())
    try:
        calib_cov_distribution(model, config, run_model, None, None)
    except ValueError:  # inputs whose squares are not finite to it
        return
    try:
        stats = collect(model, run_model, targets=names, compat="peft")
    except AdapterkitError as error:
        outcome.refusals.append(("peft", str(error)))
        return
    for name in names:
        expected = layers[name].covariance_matrix
        value = stats[f"{name}.covariance"]
        outcome.layers += 1
        apart = float((value - expected).abs().max() / expected.abs().max())
        if not apart <= 1e-4:
            outcome.wrong.append(f"peft {name}: {apart:.1e} off")

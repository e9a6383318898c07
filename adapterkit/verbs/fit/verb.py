"""fit: choose the weights of adapters by data."""

from collections.abc import Sequence
from typing import Any

from adapterkit.core.options import (
    COUNT,
    DEVICE,
    FILE,
    FILES,
    FLAG,
    PROGRESS,
    SOURCE,
    TEXT,
    WEIGHTED,
    Progress,
    Sources,
    StrPath,
    argument,
    choice,
    finite,
    no_progress,
    number,
    option,
    record,
)
from adapterkit.core.records import Check, Json
from adapterkit.core.shared_options import dtype_option, seed_option
from adapterkit.core.verb import Verb, function_of
from adapterkit.verbs.shared.options import activations_option, length_option, whole_option

LEVELS = ("adapter", "layer", "module", "direction")
# options of a fit to data
OF_DATA = (
    "target", "granularity", "start", "samples", "length", "holdout", "ridge", "loss_over",
    "whole_model", "dtype", "device", "memory",
)  # fmt: skip
SCORE = "A program instead of data"
BALANCES = ("files", "tokens", "worst", "retention")


def _ridge(value: object) -> str | float:
    amount = finite(value)
    if value != "auto" and (amount is None or amount < 0):
        raise ValueError
    return "auto" if amount is None else amount


def _bounds(value: object) -> tuple[float, float]:
    parts: Any = value.split(":") if isinstance(value, str) else value
    low, high = map(finite, parts)
    if low is None or high is None or low >= high:
        raise ValueError
    return low, high


RIDGE = Check("auto, or a number of at least 0", _ridge)
BOUNDS = Check("two numbers, LOW:HIGH", _bounds)


@record
class WeightFit(Verb[Json]):
    """Choose the weights of adapters by data: Δ' = Σᵢ cᵢ Δᵢ at each module, with the c of least
    loss. The result is a file of weights that `combine`, `merge` and the runtime read.

    The model runs with all adapters; only the c get gradients. c = start + u(adapter) + v(adapter,
    layer) + z(adapter, module) is fitted coarse to fine, each step from the one before and down to
    `granularity`. A step is kept if the loss of held-out samples falls by more than its standard
    error. `direction`: one number for each singular triplet of each delta. With 8 samples, expect
    it to stop at one number for each adapter.

    `data`: files as `stats` takes them, each with an equal share of the samples and of the loss, or
    `FILE=SHARE`. The share `holdout` of `samples` is held out, by `seed`. `target`: `labels`, the
    loss of the tokens that count; `teacher`: each file belongs to the adapter of the same position,
    and the loss is KL(p_adapter ‖ p) and 0.1 of the relative error of the last hidden states.
    Adapters' weights (`PATH=0.7`) are the start, else 1/N each; `start="stats"`: the closed form of
    the `regspan` method. `ridge`: λ/2 Σᵢ meanₘ δᵢₘ² is added, in nats, for the change δ of a step;
    `auto`: 1, 0.3, 0.1, 0.03, 0.01, as far as held-out samples improve. `bounds`: of all c.
    `loss_over`: the mean over files, over tokens, the worst file, or (L - own)/(base - own) of each
    with its adapter. `whole_model`: the model in memory, else one layer at a time, to the same
    weights within rounding. `dtype`: of the model; by default float32 on a CPU, on a GPU the
    checkpoint's.

    `score`: a program instead of data, such as `evaluate {}`. It is called with the folder of a
    candidate, the adapters' sum with one weight for each, and the last number that it prints is the
    score, the larger the better. CMA-ES chooses `evaluations` candidates, starting with the start;
    each is kept in a folder next to `out` until the search is finished. If the program fails, or
    prints no number, `Failed` names the best weights so far, and how to write them.

    Returns what `--json` prints: `losses` on held-out samples, by row and file (`base`, each
    adapter, `equal`, `start`, each step) with `value` (the objective), `steps` (`gain`, `error`,
    `kept`, `ridge`, `train`, `train_gain` and `held`), `passes` (gradients of the samples that were
    computed until then, in all), `spread` of the weights, `written`: the level, and why, `notes`,
    with one if the base or one adapter is as good; with `score`: `evaluations`, each with `weights`
    and `score`, and the `best`.

    Raises `Refused` with all problems before the model runs: DoRA (its change is no sum of
    changes), adapters of another base, trained values that are no factors, the same sample in both
    splits, too few samples. `Failed` for losses that are not finite. `resume` continues an
    interrupted fit, to the same bits."""

    name = "fit"
    one_needed = ("data", "score")
    none_given = "nothing says which weights are good"
    runner = "verbs.fit.fit:fit_weights"
    command = """Choose the weights of adapters by their loss on samples.

    Runs the model with all adapters on your samples and writes the weights with the least loss, for
    combine, merge and the runtime. It begins with one weight per adapter. Finer weights, such as
    one per module, are kept only if they lower the loss on held-out samples.

    \b
    Example:
      adapterkit fit BASE en fr --data en.jsonl --data fr.jsonl --out weights.json
      adapterkit combine en fr --weights weights.json --out both
      adapterkit fit BASE en fr --score "evaluate {}" --out weights.json
    """

    base: StrPath = argument(kw_only=False, check=SOURCE)
    adapters: Sources = argument(kw_only=False, check=WEIGHTED, metavar="ADAPTER[=W]...")
    data: StrPath | Sequence[StrPath] = option(
        default=(),
        check=FILES,
        metavar="FILE[=SHARE]",
        help="File of samples (.txt, .jsonl or .parquet), or a folder that datasets wrote; repeat "
        "for several.",
    )
    out: StrPath = option(check=FILE, metavar="FILE.json", help="File to write the weights to.")
    score: str | None = option(
        default=None,
        check=TEXT,
        metavar="CMD",
        help="Program that scores the adapter in the folder {}, instead of --data: it prints a "
        "number, larger is better. One weight is fitted for each of at most 8 adapters.",
        excludes=OF_DATA,
        section=SCORE,
        tier="experimental",
    )
    evaluations: int = option(
        default=60,
        check=COUNT,
        help="Number of times to run that program.",
        needs="score",
        section=SCORE,
        tier="experimental",
    )
    target: str = option(
        default="labels",
        check=choice(("labels", "teacher")),
        help="Fit to the tokens of the samples, or to the predictions of each file's own adapter.",
    )
    granularity: str = option(
        default="module", check=choice(LEVELS), help="Finest granularity of the weights to try."
    )
    start: str = option(
        default="weights",
        check=choice(("weights", "stats")),
        help="Start from the adapters' weights (1/N each), or from the closed form.",
    )
    samples: int = option(default=64, check=COUNT, help="Number of samples to draw.")
    length: int | None = length_option()
    holdout: float = option(
        default=0.25,
        check=number("a share between 0 and 1", lambda value: 0 < value < 1),
        help="Share of each file's samples to hold out for validation.",
    )
    seed: int = seed_option("Seed for drawing and splitting the samples.")
    ridge: str | float = option(
        default="auto",
        check=RIDGE,
        metavar="auto|NATS",
        help="Strength of the pull towards the weights of the previous step, at first the start.",
    )
    bounds: str | tuple[float, float] = option(
        default="-1:2", check=BOUNDS, metavar="LOW:HIGH", help="Bounds of all weights."
    )
    positive: bool = option(default=False, check=FLAG, help="Allow no weight below 0.")
    loss_over: str = option(
        default="files",
        check=choice(BALANCES),
        help="Minimize the mean loss over files or tokens, the worst file's loss (worst), or the "
        "loss of each file relative to its own adapter's (retention).",
    )
    whole_model: bool = whole_option()
    dtype: str | None = dtype_option(
        "Dtype of the model (default: fp32 on a CPU, otherwise the model's)."
    )
    device: str = option(
        default="auto",
        check=DEVICE,
        metavar="auto|cpu|cuda[:i]",
        help="Device that computes; auto takes a GPU where it is faster.",
    )
    memory: str | int | None = activations_option()
    dry_run: bool = option(
        default=False,
        check=FLAG,
        help="Print the numbers of samples, tokens and weights, and stop.",
    )
    resume: bool = option(default=False, check=FLAG, help="Continue an interrupted fit.")
    overwrite: bool = option(default=False, check=FLAG, help="Replace an earlier file of weights.")
    progress: Progress = option(default=no_progress, check=PROGRESS)

    @property
    def limits(self) -> tuple[float, float]:
        """The bounds of all weights."""
        low, high = _bounds(self.bounds)
        return (max(low, 0.0) if self.positive else low), high

    def recipe(self) -> Json:
        """The options that determine the result."""
        given = {name: getattr(self, name) for name in (*OF_DATA, "seed") if name != "memory"}
        return given | {"bounds": list(self.limits)}


fit = function_of(WeightFit)

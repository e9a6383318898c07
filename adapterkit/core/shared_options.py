"""Options that several verbs have, each told once."""

import math
from typing import Any

from adapterkit.core.errors import AdapterkitError, Refused
from adapterkit.core.options import (
    ABOVE_0,
    COUNT,
    DTYPE,
    FLAG,
    REGEX,
    SEED,
    SETTINGS,
    SHARE,
    SHARE_ABOVE_0,
    SIZE,
    SOURCE,
    TARGETS,
    TEXTS,
    OptionRecord,
    choice,
    number,
    option,
    record,
)
from adapterkit.core.records import Json

# sections of the helps
SEVERAL = "Methods and weights of several adapters"
QUANTIZED = "Quantization and rounding"
FOR_AMBIGUOUS_PARAMETERS = "The adapters' model, needed where target_parameters are ambiguous."
EXACT_BY_DEFAULT = " (default: exact; ranks add up)"


def base_option(help: str) -> Any:
    """The model of an adapter."""
    return option(default=None, check=SOURCE, metavar="BASE", help=help)


def statistics_option(help: str, **more: object) -> Any:
    """A file of statistics."""
    return option(default=None, check=SOURCE, metavar="FILE", help=help, **more)


def covariances_option() -> Any:
    """The covariances by which factors are fitted."""
    help = "Input covariances: minimize output error instead of weight error."
    return statistics_option(help)


def missing_statistics(rounding: str, stats: object) -> list[AdapterkitError]:
    """What is wrong with compensated rounding without statistics."""
    if rounding != "compensated" or stats is not None:
        return []
    problem, hint = (
        "--rounding compensated needs --stats",
        "collect them\nadapterkit stats BASE --data FILE --out stats.safetensors",
    )
    return [Refused(problem, expected="--stats FILE", where="options", hint=hint, code="AK102")]


def dtype_option(help: str) -> Any:
    """The dtype of what is written, another one by default."""
    return option(default=None, check=DTYPE, help=help)


def expert_layout_option() -> Any:
    """How a file without a word of it has its stacks of experts."""
    return option(
        default=None,
        check=choice(("unsloth", "peft-0.18", "peft-0.19")),
        help="Layout of expert stacks that the adapter does not name: Unsloth's before 2026-09-17, "
        "or that of a PEFT version.",
    )


def factor_dtype_option() -> Any:
    """The dtype of factors."""
    help, flags = "Dtype of the LoRA factors.", ("--dtype", "--factor-dtype")
    return option(default="fp32", check=DTYPE, help=help, flags=flags)


def targets_option(default: str, modules: str = "Modules that get factors") -> Any:
    """Which modules are meant, of which `default` says what holds without it."""
    return option(
        default=None,
        check=TARGETS,
        metavar="NAMES|REGEX",
        help=f"{modules}: all-linear, comma-separated name suffixes (q_proj,v_proj), or a regex "
        f"for whole names (default: {default}).",
    )


def seed_option(help: str = "Seed of methods that draw.", **more: object) -> Any:
    return option(default=0, check=SEED, help=help, **more)


def settings_option() -> Any:
    """A method's own options."""
    return option(
        default=None,
        check=SETTINGS,
        flags=("--set",),
        metavar="KEY=VALUE",
        help="An option of the method, see the lists below; repeat for several.",
    )


def length_option(**more: object) -> Any:
    """Where samples end."""
    return option(
        default=None,
        check=COUNT,
        help="Cut samples to this many tokens (default: 512, or the model's positions).",
        **more,
    )


def whole_option() -> Any:
    """Whether a model runs as a whole."""
    return option(
        default=False,
        check=FLAG,
        help="Hold the whole model in memory instead of one layer at a time.",
    )


def activations_option() -> Any:
    """`memory` of a verb that runs a model one layer at a time."""
    return option(
        default=None,
        check=SIZE,
        metavar="SIZE",
        help="Memory for activations, which go to disk beyond it, e.g. 8GB (default: a quarter of "
        "RAM).",
    )


def weight_for_option() -> Any:
    """Weights of adapters for some modules."""
    return option(
        default=(),
        check=TEXTS,
        metavar="[N:]REGEX=W",
        help="Another weight (of the N-th adapter) for modules whose name, or the end of it, "
        "matches.",
        section=SEVERAL,
    )


def weights_option() -> Any:
    """A file of weights of adapters."""
    return option(
        default=None,
        check=SOURCE,
        metavar="FILE",
        help="Weights of the adapters, for modules or directions too, as fit writes them; the "
        "adapters may be left out.",
        excludes=("weight_for", "lbw"),
        section=SEVERAL,
    )


def shard_size_option() -> Any:
    help = "Re-shard the output, e.g. 5GB (default: keep the base's files)."
    return option(default=None, check=SIZE, metavar="SIZE", help=help)


def tokenizer_option() -> Any:
    """Whose tokenizer the result has."""
    return option(
        default=None,
        check=choice(("base", "adapter")),
        help="adapter: copy the adapters' tokenizer (the default if they have one); base: copy "
        "none.",
    )


def verify_option() -> Any:
    return option(
        default=False,
        check=FLAG,
        help="Read the output again: check every hash; of a merge, recompute rows of each changed "
        "tensor.",
    )


def rank_option(default: str = "") -> Any:
    """The rank of a result, of which `default` says what holds without it."""
    help = f"Refit each module to this rank{default}."
    return option(default=None, check=COUNT, help=help, excludes=("energy", "space=factors"))


def energy_option() -> Any:
    """The energy that the result keeps."""
    help = "Refit each module to the smallest rank that keeps this share of its energy."
    return option(default=None, check=SHARE_ABOVE_0, help=help, excludes=("space=factors",))


@record
class MethodOptions(OptionRecord):
    """A method of combining deltas."""

    section = SEVERAL

    density: float | None = option(
        default=None,
        check=SHARE,
        help="Share of the elements to keep (ties, dare, magnitude_prune, ...).",
    )
    majority: str | None = option(
        default=None, check=choice(("total", "frequency")), help="How signs are elected (ties)."
    )
    settings: Json | None = settings_option()


@record
class ScaleOptions(OptionRecord):
    """Rank and scale of a new adapter."""

    rank: int = option(check=COUNT, help="Rank of the LoRA factors.")
    alpha: float | None = option(
        default=None, check=ABOVE_0, help="lora_alpha (default: the rank, for a scale of 1)."
    )
    rslora: bool = option(default=False, check=FLAG, help="Use the scale alpha / sqrt(rank).")

    @property
    def lora_alpha(self) -> float:
        return self.rank if self.alpha is None else self.alpha

    @property
    def scale(self) -> float:
        return self.lora_alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


@record
class TruncationOptions(OptionRecord):
    """How many singular values of a delta stay: by a number, a share of the energy, a ratio to the
    largest one, or a size of the file for all modules."""

    one_needed = ("rank", "energy", "sv_ratio", "max_size")

    rank: int | None = option(default=None, check=COUNT, help="Rank of each module.")
    energy: float | None = option(
        default=None,
        check=SHARE_ABOVE_0,
        help="Smallest rank of each module that keeps this energy share.",
    )
    sv_ratio: float | None = option(
        default=None,
        check=number("a number of at least 1", lambda value: value >= 1),
        help="Keep singular values of at least the largest one divided by this.",
    )
    max_size: str | int | None = option(
        default=None,
        check=SIZE,
        metavar="SIZE",
        help="Largest file, e.g. 50MB: ranks go to the largest singular values.",
    )

    @property
    def size(self) -> int:
        """`max_size` in bytes."""
        return int(self.max_size or 0)

    def max_rank(self, full: int) -> int:
        """The largest rank that a delta of full rank `full` can get."""
        return min(self.rank, full) if self.rank is not None else full


@record
class BlockOptions(OptionRecord):
    """What is quantized, and in which blocks."""

    section = QUANTIZED

    skip: str | None = option(
        default=None,
        check=REGEX,
        metavar="REGEX",
        help="Do not quantize modules whose name matches this regex.",
    )
    block_size: int | None = option(
        default=None, check=COUNT, help="Values that share a scale (nf4, fp4: 64; w4a16: 128)."
    )
    double_quant: bool = option(
        default=False, check=FLAG, help="Quantize the scales too (nf4, fp4)."
    )


@record
class ModuleFilters(OptionRecord):
    """Which modules are meant."""

    include: str | None = option(
        default=None,
        check=REGEX,
        metavar="REGEX",
        help="Only modules whose name matches this regex.",
    )
    exclude: str | None = option(
        default=None, check=REGEX, metavar="REGEX", help="No modules whose name matches this regex."
    )

"""Options that several verbs share, except merge and verify."""

import math
from collections.abc import Sequence
from typing import Any

from adapterkit.core.options import (
    ABOVE_0,
    COUNT,
    DTYPE,
    FLAG,
    SHARE_ABOVE_0,
    SIZE,
    TARGETS,
    OptionRecord,
    choice,
    number,
    option,
    record,
)
from adapterkit.core.shared_options import (
    NAMING,
    OUTPUT_FOLDER,
    QUANTIZED,
    modules_option,
    statistics_option,
)

FOR_AMBIGUOUS_PARAMETERS = "The adapters' base, needed if target_parameters are ambiguous."
EXACT_BY_DEFAULT = " (default: exact; ranks add up)"


def adapter_output_option() -> Any:
    """`out` of a verb that makes one adapter from others."""
    return option(
        check=OUTPUT_FOLDER,
        metavar="DIR|FILE.safetensors|hf://ORG/NAME",
        help="Output folder, .safetensors file in the layout of the first adapter, or "
        "hf://ORG/NAME. It appears when it is complete.",
    )


def factor_dtype_option() -> Any:
    """The dtype of factors."""
    help, flags = "Dtype of the LoRA factors.", ("--dtype", "--factor-dtype")
    return option(default="fp32", check=DTYPE, help=help, flags=flags)


def targets_option(default: str, modules: str = "Modules that get factors") -> Any:
    """The selection of modules; `default` describes it without the option."""
    return option(
        default=None,
        check=TARGETS,
        metavar="NAMES|REGEX",
        help=f"{modules}: all-linear, {NAMING} (default: {default}).",
    )


def covariances_option() -> Any:
    """The covariances for fitting factors."""
    help = (
        "Statistics with covariances of the layers' inputs, to minimize the error of the "
        "outputs instead of the weights."
    )
    return statistics_option(help)


def rank_option(default: str = "") -> Any:
    """The rank of a result; `default` describes it without the option."""
    help = f"Refit each module to this rank{default}."
    return option(default=None, check=COUNT, help=help, excludes=("energy", "space=factors"))


def energy_option() -> Any:
    """The energy that the result keeps."""
    help = "Refit each module to the smallest rank that keeps this share of its energy."
    return option(default=None, check=SHARE_ABOVE_0, help=help, excludes=("space=factors",))


def tokenizer_option() -> Any:
    """The source of the result's tokenizer."""
    return option(
        default=None,
        check=choice(("base", "adapter")),
        help="Copy the adapters' tokenizer (adapter, the default if they have one) or none (base).",
    )


def length_option(**more: object) -> Any:
    """The maximal length of samples."""
    return option(
        default=None,
        check=COUNT,
        help="Cut samples to this many tokens (default: 512, or the model's number of positions "
        "if smaller).",
        **more,
    )


def whole_option() -> Any:
    """The choice to run a model as a whole."""
    return option(
        default=False,
        check=FLAG,
        help="Keep the whole model in memory instead of one layer at a time.",
    )


def activations_option() -> Any:
    """`memory` of a verb that runs a model one layer at a time."""
    return option(
        default=None,
        check=SIZE,
        metavar="SIZE",
        help="Memory for activations, for example 8GB; the rest is kept on disk (default: a "
        "quarter of the RAM).",
    )


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
    """The number of singular values of a delta to keep: by a number, a share of the energy, a ratio
    to the largest one, or a size of the file for all modules."""

    one_needed = ("rank", "energy", "sv_ratio", "max_size")

    rank: int | None = option(default=None, check=COUNT, help="Rank of each module.")
    energy: float | None = option(
        default=None,
        check=SHARE_ABOVE_0,
        help="For each module, take the smallest rank that keeps this share of its energy.",
    )
    sv_ratio: float | None = option(
        default=None,
        check=number("a number of at least 1", lambda value: value >= 1),
        help="Drop singular values smaller than the largest one divided by this number.",
    )
    max_size: str | int | None = option(
        default=None,
        check=SIZE,
        metavar="SIZE",
        help="Largest size of the file, for example 50MB; modules with larger singular values get "
        "higher ranks.",
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
    """The weights to quantize, and the blocks."""

    section = QUANTIZED

    skip: str | Sequence[str] | None = modules_option("Do not quantize these modules")
    block_size: int | None = option(
        default=None,
        check=COUNT,
        help="Number of values that share a scale (default for nf4 and fp4: 64; for w4a16: 128).",
    )
    double_quant: bool = option(
        default=False, check=FLAG, help="Quantize the scales too (nf4, fp4)."
    )

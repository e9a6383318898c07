"""Options by product: each record brings the section of the help that its options stand under."""

from collections.abc import Iterable
from typing import Any

from adapterkit.core.options import FLAG, TEXT, TEXTS, OptionRecord, choice, option, record
from adapterkit.core.registry import declarations
from adapterkit.core.shared_options import (
    QUANTIZED,
    SEVERAL,
    seed_option,
    statistics_option,
    weight_for_option,
)

GGUF, IMAGES = "Models in GGUF files", "Image and video models"
WRITTEN_TYPES = (
    "f32", "f16", "bf16", "q8_0", "q6_k", "q5_k", "q5_1", "q5_0", "q4_k", "q4_1", "q4_0", "q3_k",
    "q2_k", "iq4_nl", "iq4_xs", "mxfp4", "tq1_0", "tq2_0",
)  # fmt: skip


def compensation_option() -> Any:
    """The covariances by which rounding is compensated."""
    help = "Covariances of the layers' inputs, for --rounding compensated."
    return statistics_option(help, needs="rounding=compensated", section=QUANTIZED)


def importance_option() -> Any:
    """The importance matrix of a GGUF model."""
    help = (
        "Importance matrix of llama.cpp, .gguf or .dat: weighs the errors when scales of a GGUF "
        "model are searched."
    )
    return statistics_option(help, section=GGUF)


def modelfile_option() -> Any:
    help = "Write a Modelfile for Ollama beside the output, which is a GGUF file."
    return option(default=False, check=FLAG, help=help, section=GGUF)


def _methods() -> list[str]:
    """Those that need nothing but the adapters."""
    known = declarations("combinations").items()
    return [name for name, one in known if one.constants["acts_on"] != "covariances"]


@record
class QuantizedMergeOptions(OptionRecord):
    """How changed weights are rounded, and quantized ones written."""

    section = QUANTIZED

    dequantize: bool = option(
        default=False,
        check=FLAG,
        help="Write a quantized base's weights as 16-bit floats (default: keep the format).",
    )
    rounding: str = option(
        default="nearest",
        check=choice(("nearest", "stochastic", "compensated")),
        help="Rounding of changed weights; stochastic: unbiased, so that small deltas survive; "
        "compensated: errors carried on, so that outputs change least.",
    )


@record
class MethodMergeOptions(OptionRecord):
    """How the deltas of several adapters are combined, with other values for some modules."""

    section = SEVERAL
    needs = dict.fromkeys(("density", "majority", "settings"), "method")

    method: str | None = option(
        default=None,
        check=choice(_methods),
        metavar="NAME",
        help="How the deltas are combined, see the list below (default: linear, their sum).",
        excludes=("compat",),
    )
    density_for: Iterable[str] = option(
        default=(),
        check=TEXTS,
        metavar="[N:]REGEX=D",
        help="Another density (of the N-th adapter) for modules whose name, or the end of it, "
        "matches.",
        needs="method",
    )
    seed: int = seed_option(
        "Seed of stochastic rounding, and of methods that draw: same seed, same bytes.",
        needs="rounding=stochastic or method",
    )
    weight_for: Iterable[str] = weight_for_option()


@record
class GgufMergeOptions(OptionRecord):
    """How the tensors of a GGUF model are written, and what lies beside the file."""

    section = GGUF

    touched_as: str | None = option(
        default=None,
        check=choice(WRITTEN_TYPES),
        help="Type of blocks of the tensors of a GGUF model that change (default: their own).",
    )
    scales: str | None = option(
        default=None,
        check=choice(("search", "keep")),
        help="Scales of changed blocks of a GGUF model: the best ones (search, the default), or "
        "those that are there, where the new values fit.",
    )
    modelfile: bool = modelfile_option()


@record
class ImageMergeOptions(OptionRecord):
    """Which weights of an image model are meant, and how much each of its blocks gets."""

    section = IMAGES

    lbw: Iterable[str] = option(
        default=(),
        check=TEXTS,
        metavar="[N:]NAME|LIST|FILE",
        help="Factors of the weight (of the N-th adapter) on the blocks of an image model: a "
        "preset (ALL0.5, INS, MIDD, OUTD, ...), numbers separated by commas, FILE:NAME of a file "
        "of presets, or a JSON file of diffusers' or ComfyUI's settings.",
        contents="bases.images.block_weights:with_files",
    )
    variant: str | None = option(
        default=None,
        check=TEXT,
        metavar="NAME",
        help="Weights of a pipeline of diffusers, such as fp16 (default: those without a name, or "
        "the only ones).",
    )

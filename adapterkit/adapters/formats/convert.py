"""convert: write an adapter in the layout of another tool."""

from collections.abc import Iterable

from adapterkit.core.options import (
    ABOVE_0,
    COUNT,
    FLAG,
    SOURCE,
    TEXT,
    OptionRecord,
    StrPath,
    argument,
    choice,
    option,
    record,
    text,
)
from adapterkit.core.records import Check
from adapterkit.core.shared_options import IMAGES, base_option, dtype_option, expert_layout_option
from adapterkit.core.verb import WritingVerb, function_of

COMPONENTS = (
    "unet", "transformer", "transformer_2", "text_encoder", "text_encoder_2", "text_encoder_3"
)  # fmt: skip


def written_formats() -> Iterable[str]:
    """The formats that can be written. The help of `convert` is the only reader of their tables."""
    from adapterkit.adapters.formats import library

    return library.written_formats()


@record
class ConvertOptions(OptionRecord):
    """Options of writing an adapter in the layout of another tool."""

    to: str = option(
        check=Check("a text", text, words=written_formats), help="Format to write, listed below."
    )
    alpha: float | None = option(
        default=None, check=ABOVE_0, help="Alpha of a source that does not contain one."
    )
    rank: int | None = option(
        default=None,
        check=COUNT,
        help="Convert LoHa, LoKr, OFT and others to LoRA factors of this rank.",
    )
    expert_layout: str | None = expert_layout_option()
    dtype: str | None = dtype_option("Dtype of the tensors (default: the source's).")
    lossy: bool = option(
        default=False, check=FLAG, help="Drop norms and biases that the format cannot store."
    )
    component: str | None = option(
        default=None,
        check=choice(COMPONENTS),
        help="Convert only this component of a pipeline; for an adapter of a single model, the "
        "component that it belongs to.",
        section=IMAGES,
    )
    architecture: str | None = option(
        default=None,
        check=TEXT,
        metavar="NAME",
        help="The model's family, if the names fit several (see --list).",
        section=IMAGES,
    )


@record
class Convert(WritingVerb, ConvertOptions):
    """Write an adapter in the layout of another tool: the same delta, scale · b @ a, of every
    module.

    The keys and settings of the source determine its format. Every key must have a role; otherwise
    the source is refused with the whole list. Fused modules are split with a shared a, and fused
    again without a larger rank. If the format stores no scale, b takes it, rounded once, and a note
    says so. `base`, a model, resolves underscored names and numbers of heads. `architecture` names
    the family if module names fit several. `alpha` is needed if the source leaves it to the reader.
    `component` selects one component of a pipeline (unet, transformer, text_encoder, ...), or
    names the component of a single model. `rank` fits standard LoRA factors to LoHa, LoKr, OFT,
    differences of weights, factors of a larger rank, and DoRA if the format lacks it; the receipt
    has the error (DoRA, OFT and VeRA need `base`). `lossy` leaves out differences of norms and
    biases that the format cannot store. An `out` that ends in .safetensors or .gguf is a file,
    otherwise a folder in the format's layout. Raises `Refused` before anything is written.
    """

    tier = "core"
    planner = "adapters.formats.planning.plan:plan_conversion"
    command = """Convert an adapter between the formats of tools.

    The format of the source is detected. If a key cannot be converted, nothing is written and every
    such key is listed. The scale is kept; if the format cannot store it, it is multiplied into b.

    With --from-list the exit status is 1 if any conversion was refused or failed; --resume skips
    finished conversions.

    \b
    Example:
      adapterkit convert kohya.safetensors --to diffusers --out folder
      adapterkit convert org/adapter --to kohya --architecture sdxl --out lora.safetensors
      adapterkit convert adapter.safetensors --detect --json
      adapterkit convert --from-list sources.txt --to peft --out-pattern "out/{name}" --resume
    """

    src: StrPath = argument(kw_only=False, check=SOURCE)
    base: StrPath | None = base_option(
        "The adapter's base, if its names or shapes are needed to read or write the file."
    )
    allow_pickle: bool = option(
        default=False,
        check=FLAG,
        help="Read .pt, .pth and .bin files with torch's weights_only loader.",
    )


convert = function_of(Convert)

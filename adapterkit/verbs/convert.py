"""convert: an adapter from the layout of one tool into that of another."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit.hub.ids import is_on_hub
from adapterkit.options import FLAG, SOURCE, StrPath, argument, option, record
from adapterkit.planning.convert.options import ConvertOptions
from adapterkit.shared_options import base_option
from adapterkit.verb import WritingVerb, function_of

if TYPE_CHECKING:
    from adapterkit.plan import Plan

FILES = (".safetensors", ".gguf")


@record
class Convert(WritingVerb, ConvertOptions):
    """Write an adapter in the layout of another tool: the same delta, scale · b @ a, of every
    module.

    The source's format is told by its keys and settings. Every key has a role, or the source is
    refused with the whole list. Fused modules are split with a shared a, and fused again without a
    larger rank. A format that stores no scale has it in b, rounded once, which a note says.
    `base`, a model, tells underscored names and numbers of heads; `architecture` the names of its
    family, where names alone are ambiguous; `alpha` what the source leaves to the reader;
    `prefix_only` takes one component of a pipeline (unet, transformer, text_encoder, ...), and says
    which one the modules of a single model are. `rank` makes plain factors of LoHa,
    LoKr, OFT, VeRA, AdaLoRA and differences of weights, of DoRA where the format has none (with
    `base`, like OFT), and of larger factors: the best ones of that rank, whose error the receipt
    has. `lossy` leaves out
    differences of norms and biases that the format has no place for. An `out` that ends in
    .safetensors or .gguf is a file, else a folder as the format has it. Raises `Refused` before
    anything is written.
    """

    command = """Convert an adapter between the formats of tools.

    The source's format is detected. Every key of it is used, or the conversion is refused with all
    that is in the way; the scale is kept, multiplied into B where the format cannot store it.

    With --from-list the exit status is 1 if any conversion was refused or failed; with --resume
    those that are done are left as they are.

    \b
    Example:
      adapterkit convert kohya.safetensors --to diffusers --out folder
      adapterkit convert org/adapter --to kohya --architecture sdxl --out lora.safetensors
      adapterkit convert adapter.safetensors --detect --json
      adapterkit convert --from-list sources.txt --to peft --out-pattern 'out/{name}' --resume
    """

    src: StrPath = argument(check=SOURCE)
    base: StrPath | None = base_option(
        "The adapter's model, where its names or shapes are needed to read or write it."
    )
    allow_pickle: bool = option(
        default=False,
        check=FLAG,
        help="Read .pt, .pth and .bin files with torch's weights_only loader.",
    )

    def make_plan(self) -> "Plan":
        from adapterkit.engines.hub_inputs import plan_in_parts
        from adapterkit.planning.convert.plan import plan_convert
        from adapterkit.planning.sources import open_base, open_unconverted

        target = Path(self.out)
        is_file = target.suffix in FILES and not is_on_hub(self.out)
        source = open_unconverted(self.src, self.allow_pickle)
        base = None if self.base is None else open_base(self.base)
        options, name = self.only(ConvertOptions), target.name if is_file else None
        return replace(plan_in_parts(plan_convert(source, options, base, name)), is_file=is_file)


convert = function_of(Convert)

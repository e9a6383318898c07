"""The options of a conversion that its plan depends on."""

from collections.abc import Iterable

from adapterkit.options import (
    ABOVE_0,
    COUNT,
    FLAG,
    TEXT,
    Check,
    Checked,
    choice,
    option,
    record,
    text,
)
from adapterkit.shared_options import dtype_option

COMPONENTS = (
    "unet", "transformer", "transformer_2", "text_encoder", "text_encoder_2", "text_encoder_3"
)  # fmt: skip


def written_formats() -> Iterable[str]:
    """The formats that are written; their tables are read for the help of `convert` alone."""
    from adapterkit.formats import library

    return library.written_formats()


@record
class ConvertOptions(Checked):
    """How an adapter is written in the layout of another tool."""

    to: str = option(
        check=Check(text, words=written_formats),
        help="Format to write; see the list below.",
    )
    alpha: float | None = option(
        default=None, check=ABOVE_0, help="Alpha of a source that has none."
    )
    rank: int | None = option(
        default=None,
        check=COUNT,
        help="Make plain factors of this rank of LoHa, LoKr, OFT and the like.",
    )
    dtype: str | None = dtype_option("Dtype of the tensors (default: the source's).")
    lossy: bool = option(
        default=False, check=FLAG, help="Drop norms and biases that the format cannot store."
    )
    prefix_only: str | None = option(
        default=None,
        check=choice(COMPONENTS),
        help="Convert this part of a pipeline alone; of a single model's adapter, which part it "
        "is.",
    )
    architecture: str | None = option(
        default=None,
        check=TEXT,
        metavar="NAME",
        help="The model's family, where the names fit several (see --list).",
    )

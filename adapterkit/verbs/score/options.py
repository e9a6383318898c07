"""Options of the verbs that run models on samples."""

from adapterkit.core.options import COUNT, DEVICE, OptionRecord, option, record
from adapterkit.core.shared_options import dtype_option, seed_option
from adapterkit.verbs.shared.options import activations_option, length_option


@record
class SampleOptions(OptionRecord):
    """The samples to measure on, and how the model runs."""

    samples: int = option(default=256, check=COUNT, help="Number of samples to draw.")
    length: int | None = length_option()
    seed: int = seed_option("Seed for drawing the samples.")
    dtype: str | None = dtype_option("Dtype of the model's arithmetic (default: fp32).")
    device: str = option(
        default="auto",
        check=DEVICE,
        metavar="auto|cpu|cuda[:i]",
        help="Device that computes; auto takes a GPU where it is faster.",
    )
    memory: str | int | None = activations_option()

"""dequantize: decode a quantized checkpoint to floats."""

from adapterkit.core.options import SOURCE, StrPath, argument, record
from adapterkit.core.shared_options import dtype_option, shard_size_option
from adapterkit.core.verb import WritingVerb, function_of


@record
class Dequantize(WritingVerb):
    """Decode a quantized checkpoint: W = round(code * scale), in `dtype` (default: the compute
    dtype of its library).

    Reads every format in the command's help, also several in one checkpoint; tensors that are not
    quantized do not change. The output has the base's files, or with `max_shard_size` (5GB) files
    up to that size. Raises `Refused` before anything is written.

    A GGUF model file (`pip install gguf`) becomes a checkpoint of transformers' names and layouts,
    with config and tokenizer, in files of 5 GB at most. The default `dtype` is bf16 for blocks,
    because their quantization error is larger than its rounding; a file of floats keeps its dtype.
    An image model becomes one safetensors file with its own names.
    """

    planner = "bases.quantized.planning.dequantize:plan_dequantize"
    command = """Convert a quantized checkpoint or a GGUF file to floats.

    \b
    Example:
      adapterkit dequantize ./model-nf4 --dtype bf16 --out model-bf16
      adapterkit dequantize ./model.Q4_K_M.gguf --out model            # needs: pip install gguf
    """

    base: StrPath = argument(kw_only=False, check=SOURCE)
    dtype: str | None = dtype_option(
        "Dtype of the decoded weights (default: the one that the format's library computes in)."
    )
    max_shard_size: str | int | None = shard_size_option()


dequantize = function_of(Dequantize)

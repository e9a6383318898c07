"""Commands on quantized checkpoints: quantize, dequantize, loftq."""

from typing import Any

import click

from adapterkit.cli.command import ListingCommand, WritingCommand
from adapterkit.cli.completion import Source
from adapterkit.cli.methods import format_names, formats
from adapterkit.cli.options import (
    block_options,
    dtype_option,
    factor_options,
    hash_option,
    init_options,
    output_options,
    shard_size_option,
    skip_option,
    statistics_option,
    stats_option,
    targets_option,
)
from adapterkit.cli.output import run_verb


@click.command(cls=ListingCommand, lists=formats)
@click.argument("base", type=Source())
@output_options
@click.option("--to", required=True, type=format_names, help="Format to write; see the list below.")
@block_options
@skip_option
@click.option(
    "--rounding",
    type=click.Choice(["nearest", "compensated"]),
    default="nearest",
    show_default=True,
    help="compensated: errors carried from input to input, so that outputs change least.",
)
@statistics_option("Covariances of the layers' inputs, for --rounding compensated.")
@hash_option
def quantize(base: str, **options: Any) -> None:
    """Quantize a checkpoint's linear layers.

    As transformers would: the output layer, embeddings and norms stay as they are.

    \b
    Example:
      adapterkit quantize ./model --to nf4 --double-quant --out model-nf4
      adapterkit quantize ./model --to int8 --skip 'layers.0[.]' --out model-int8
    """
    from adapterkit.verbs.quantize import quantize as verb

    run_verb(verb, base, **options)


@click.command(cls=WritingCommand)
@click.argument("base", type=Source())
@output_options
@dtype_option("Dtype of the decoded weights (default: the one the format's library computes in).")
@shard_size_option
@hash_option
def dequantize(base: str, **options: Any) -> None:
    """Decode a quantized checkpoint or GGUF file into floats.

    \b
    Example:
      adapterkit dequantize ./model-nf4 --dtype bf16 --out model-bf16
      adapterkit dequantize ./model.Q4_K_M.gguf --out model            # needs adapterkit[gguf]
    """
    from adapterkit.verbs.dequantize import dequantize as verb

    run_verb(verb, base, **options)


@click.command(cls=WritingCommand)
@click.argument("base", type=Source())
@output_options
@init_options
@click.option(
    "--bits", type=click.Choice(["4", "8"]), default="4", show_default=True, help="nf4, or int8."
)
@click.option(
    "--bits-for",
    metavar="REGEX=N",
    multiple=True,
    help="Other bits for some modules, e.g. 'down_proj=8'; writes compressed-tensors.",
)
@click.option(
    "--iterations",
    type=int,
    default=4,
    show_default=True,
    help="Iterations, of which the best is kept.",
)
@targets_option("all quantized modules")
@skip_option
@block_options
@click.option(
    "--quantized",
    type=Source(),
    metavar="QBASE",
    help="Keep this quantized version of BASE, and write only the adapter for it.",
)
@stats_option
@factor_options
def loftq(base: str, **options: Any) -> None:
    """Quantize a base and fit an adapter to the error (LoftQ).

    W ≈ Q + scale·b@a: DIR/base is the quantized base, DIR/adapter the adapter to train.

    \b
    Example:
      adapterkit loftq ./model --rank 16 --out loftq
      adapterkit loftq ./model --rank 16 --bits-for 'down_proj|layers.0[.]=8' --out loftq
      adapterkit loftq ./model --quantized ./model-nf4 --rank 16 --out adapter
    """
    from adapterkit.verbs.loftq import loftq as verb

    run_verb(verb, base, **options)

"""Commands on a base checkpoint: merge, extract, init."""

from typing import Any

import click

from adapterkit.cli.command import ListingCommand, WritingCommand
from adapterkit.cli.completion import Source
from adapterkit.cli.methods import format_names, init_names, initializations
from adapterkit.cli.options import (
    block_options,
    choice_option,
    dtype_option,
    factor_options,
    hash_option,
    init_options,
    module_filters,
    output_options,
    parse_settings,
    push_option,
    rank_options,
    seed_option,
    set_option,
    shard_size_option,
    skip_option,
    statistics_option,
    stats_option,
    targets_option,
    verify_option,
)
from adapterkit.cli.output import run_verb


@click.command(cls=WritingCommand)
@click.argument("base", type=Source())
@click.argument("adapters", type=Source(), nargs=-1, required=True, metavar="ADAPTER[=W]...")
@output_options
@dtype_option("Cast floating-point tensors (default: keep the base's dtypes).")
@shard_size_option
@module_filters
@choice_option(
    "--tied",
    default="untie",
    show_default=True,
    help="If only one of two tied embeddings changes: write two weights, change the shared one "
    "(as PEFT does in memory), or refuse.",
)
@click.option(
    "--base-is-residual",
    is_flag=True,
    help="BASE is the residual base that came with a PiSSA-like adapter.",
)
@choice_option(
    "--base-copies",
    help="If an adapter's copy of the base's embedding differs from BASE's: "
    "ignore the copy, or use the adapter's.",
)
@choice_option("--compat", help="PEFT's rounding, and its order of several adapters.")
@choice_option(
    "--expert-layout",
    help="PEFT version that saved the adapter (only for square expert weights).",
)
@choice_option(
    "--tokenizer", help="Tokenizer of the output (default: the adapter's, if it has one)."
)
@click.option(
    "--dequantize",
    is_flag=True,
    help="Write a quantized base's weights as 16-bit floats (default: keep the format).",
)
@click.option(
    "--base16",
    type=Source(),
    metavar="ORIGINAL",
    help="Merge into this 16-bit original of BASE, the quantized model that was trained on.",
)
@choice_option(
    "--rounding",
    default="nearest",
    show_default=True,
    help="Rounding of changed weights; stochastic: unbiased, so that small deltas survive; "
    "compensated: errors carried on, so that outputs change least.",
)
@statistics_option("Covariances of the layers' inputs, for --rounding compensated.")
@click.option(
    "--seed",
    type=int,
    default=0,
    show_default=True,
    help="Seed of stochastic rounding: same seed, same bytes.",
)
@hash_option
@verify_option
@push_option
def merge(base: str, adapters: tuple[str, ...], **options: Any) -> None:
    """Merge adapters into a base checkpoint.

    Each weight becomes W' = round(W + Σ weight·scale·b@a).

    \b
    Example:
      adapterkit merge meta-llama/Llama-3.1-8B ./my-adapter --out merged
      adapterkit merge ./base ./style=0.7 ./skill=0.3 --out merged --verify
      adapterkit merge ./merged ./my-adapter=-1 --out unmerged
    """
    from adapterkit.verbs.merge import merge as verb

    run_verb(verb, base, adapters, **options)


@click.command(cls=WritingCommand)
@click.argument("base", type=Source())
@click.argument("tuned", type=Source())
@output_options
@rank_options
@stats_option
@module_filters
@choice_option(
    "--rest",
    default="save",
    show_default=True,
    help="Tensors that differ and get no factors (embeddings, norms, biases): "
    "save them whole, drop them, or refuse.",
)
@factor_options
def extract(base: str, tuned: str, **options: Any) -> None:
    """Extract the adapter between a base and its fine-tune.

    b@a ≈ W_tuned - W_base, the best approximation of that rank. Before it is published, the adapter
    is read back and its merge into the base planned. Differing shapes are refused, except the
    vocabulary's. Loading parameters that are saved whole (a class token, a tied embedding, biases)
    with PEFT modifies the base in memory.

    \b
    Example:
      adapterkit extract ./base ./fine-tune --rank 32 --out adapter
      adapterkit extract ./base ./fine-tune --max-size 50MB --out adapter
    """
    from adapterkit.verbs.extract import extract as verb

    run_verb(verb, base, tuned, **options)


@click.command(cls=ListingCommand, lists=initializations)
@click.argument("base", type=Source())
@output_options
@click.option(
    "--method", required=True, type=init_names, help="Initialization; see the list below."
)
@init_options
@click.option("--rank-for", multiple=True, metavar="REGEX=N", help="Another rank for some modules.")
@click.option(
    "--alpha-for", multiple=True, metavar="REGEX=A", help="Another lora_alpha for some modules."
)
@targets_option("PEFT's for the model's type")
@click.option(
    "--exclude", metavar="REGEX", help="No factors on modules whose name matches this regex."
)
@click.option("--layers", metavar="N-M,N", help="Only targets in these layers, e.g. 0-11,20.")
@statistics_option("Statistics from adapterkit stats (corda, eva, lora_ga).")
@set_option
@seed_option
@choice_option(
    "--residual",
    default="write",
    show_default=True,
    help="Write the base that is left, or keep the original and the initial factors (implicit).",
)
@click.option(
    "--quantize", type=format_names, help="Quantize the residual base, e.g. nf4 (QPiSSA)."
)
@skip_option
@block_options
@factor_options
def init(base: str, settings: tuple[str, ...], **options: Any) -> None:
    """Initialize an adapter on a base.

    DIR/adapter gets the factors. Methods that take a part of each weight leave the residual in
    DIR/base.

    \b
    Example:
      adapterkit init ./model --method gaussian --rank 16 --targets all-linear --out start
      adapterkit init ./model --method pissa --rank 16 --out pissa
      adapterkit init ./model --method olora --rank 16 --residual implicit --out olora
      adapterkit init ./model --method pissa --rank 16 --quantize nf4 --double-quant --out qpissa
      adapterkit init ./model --method eva --rank 16 --stats stats.safetensors --out eva
    """
    from adapterkit.verbs.init import init as verb

    run_verb(verb, base, settings=parse_settings(settings), **options)

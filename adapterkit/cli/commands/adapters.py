"""Commands on adapters: combine, subtract, arrow, resize, rebase."""

from typing import Any

import click

from adapterkit.cli.command import ListingCommand, WritingCommand
from adapterkit.cli.completion import Source
from adapterkit.cli.methods import combinations, combine_names
from adapterkit.cli.options import (
    EXACT_BY_DEFAULT,
    base_option,
    choice_option,
    factor_options,
    output_options,
    parse_settings,
    rank_options,
    refit_options,
    seed_option,
    set_option,
    stats_option,
    tokenizer_option,
)
from adapterkit.cli.output import run_verb

FOR_AMBIGUOUS_PARAMETERS = "The adapters' model, needed where target_parameters are ambiguous."


@click.command(cls=ListingCommand, lists=combinations)
@click.argument("adapters", type=Source(), nargs=-1, required=True, metavar="ADAPTER[=W]...")
@output_options
@base_option("The adapters' model, needed for DoRA and where target_parameters are ambiguous.")
@click.option(
    "--method",
    required=True,
    type=combine_names,
    metavar="NAME",
    help="How the deltas are combined; see the lists below.",
)
@choice_option(
    "--space",
    default="delta",
    show_default=True,
    help="Combine the deltas scale·b@a, or a and b separately (PEFT's arithmetic, with its "
    "cross terms).",
)
@refit_options()
@click.option(
    "--density",
    type=float,
    help="Share of the elements to keep (ties, dare, magnitude_prune, ...).",
)
@choice_option("--majority", help="How signs are elected (ties).")
@click.option(
    "--svd-clamp",
    type=float,
    metavar="Q",
    help="Clamp the factors at this quantile of their elements, as PEFT does.",
)
@click.option(
    "--stats",
    multiple=True,
    type=Source(),
    metavar="FILE",
    help="Input covariances: minimize output error in the refit; one for all adapters, or one "
    "for each, in their order (regmean).",
)
@click.option(
    "--weight-for",
    multiple=True,
    metavar="[N:]REGEX=W",
    help="Another weight (of the N-th adapter) for modules whose name matches REGEX.",
)
@set_option
@seed_option
@tokenizer_option
@factor_options
def combine(adapters: tuple[str, ...], settings: tuple[str, ...], **options: Any) -> None:
    """Combine several adapters into one.

    Δ' = method(w₁Δ₁, w₂Δ₂, ...), written as factors of scale 1.

    The weights of slerp give the position on the arc: 0.7 and 0.3, or --set t=0.3. For PEFT's
    linear, ties and the like, which act on a and b separately, add --space factors.

    \b
    Example:
      adapterkit combine ./english ./french=0.5 --method linear --out both
      adapterkit combine ./a ./b ./c --method ties --density 0.2 --rank 32 --out merged
      adapterkit combine ./a ./b --method regmean --stats a.safetensors --stats b.safetensors
    """
    from adapterkit.verbs.combine import combine as verb

    run_verb(verb, adapters, settings=parse_settings(settings), **options)


@click.command(cls=WritingCommand)
@click.argument("adapters", type=Source(), nargs=-1, required=True, metavar="ADAPTER...")
@click.option(
    "--general",
    multiple=True,
    required=True,
    type=Source(),
    metavar="ADAPTER",
    help="Adapter of what all tasks share; repeat for several.",
)
@output_options
@base_option(FOR_AMBIGUOUS_PARAMETERS)
@choice_option(
    "--space",
    default="delta",
    show_default=True,
    help="Subtract the deltas (exact), or the means of a and b separately, as PEFT does.",
)
@click.option(
    "--exclude",
    metavar="REGEX",
    help="Subtract nothing from modules whose name matches this regex.",
)
@refit_options(EXACT_BY_DEFAULT)
@tokenizer_option
@factor_options
def subtract(adapters: tuple[str, ...], **options: Any) -> None:
    """Subtract the mean of general adapters (GenKnowSub).

    Δ' = Δ - mean Δ_general, of each task adapter.

    \b
    Example:
      adapterkit subtract ./medicine --general ./english --general ./french --out medicine-only
      adapterkit subtract ./law ./medicine --general ./english --rank 16 --out purified
    The second writes purified/law and purified/medicine.
    """
    from adapterkit.verbs.subtract import subtract as verb

    run_verb(verb, adapters, **options)


@click.command(cls=WritingCommand)
@click.argument("adapters", type=Source(), nargs=-1, required=True, metavar="ADAPTER...")
@click.option(
    "--general",
    multiple=True,
    type=Source(),
    metavar="ADAPTER",
    help="Adapter to subtract from all experts first; repeat for several.",
)
@output_options
@click.option(
    "--top-k", type=int, help="Experts per token (default: 3, or all if there are fewer)."
)
@click.option(
    "--temperature",
    type=float,
    default=1.0,
    show_default=True,
    help="Temperature of the softmax over the selected experts.",
)
@choice_option("--compat", help="PEFT's power iteration for prototypes, and its subtraction.")
@click.option("--seed", type=int, help="Seed of --compat peft (default: 0).")
@factor_options
def arrow(adapters: tuple[str, ...], **options: Any) -> None:
    """Stack adapters as experts with routing prototypes (Arrow).

    \b
    Example:
      adapterkit arrow ./law ./medicine ./code --out experts
      adapterkit arrow ./law ./medicine ./code --general ./english --top-k 2 --out experts
    """
    from adapterkit.verbs.arrow import arrow as verb

    run_verb(verb, adapters, **options)


@click.command(cls=WritingCommand)
@click.argument("adapter", type=Source())
@output_options
@base_option(
    "The model it was trained on: OFT, VeRA and convolutions need it; with it DoRA becomes plain "
    "LoRA."
)
@rank_options
@stats_option
@click.option(
    "--alpha",
    type=click.Choice(["rank", "keep"]),
    default="rank",
    show_default=True,
    help="lora_alpha of the result: each module's rank (scale 1), or the adapter's own.",
)
@factor_options
def resize(adapter: str, **options: Any) -> None:
    """Change an adapter's rank, or its kind to plain LoRA.

    Each delta gets its best approximation of the new rank, computed from the factors alone.
    LoHa, LoKr, VeRA, AdaLoRA and OFT adapters, and with --base DoRA, become plain LoRA.

    \b
    Example:
      adapterkit resize ./rank-64 --rank 16 --out rank-16
      adapterkit resize ./rank-64 --energy 0.95 --dtype bf16 --out smaller
      adapterkit resize ./oft --base ./model --rank 32 --out lora
    """
    from adapterkit.verbs.resize import resize as verb

    run_verb(verb, adapter, **options)


@click.command(cls=WritingCommand)
@click.argument("adapter", type=Source())
@click.option(
    "--initial",
    type=Source(),
    metavar="ADAPTER",
    help="The same adapter as saved before training (default: ADAPTER/initial, of init "
    "--residual implicit).",
)
@output_options
@base_option(FOR_AMBIGUOUS_PARAMETERS)
@refit_options(EXACT_BY_DEFAULT)
@factor_options
def rebase(adapter: str, **options: Any) -> None:
    """Turn a PiSSA-like adapter into LoRA on the original base.

    Δ' = s·b@a - s₀·b₀@a₀, for adapters initialized by PiSSA, OLoRA, CorDA or LoRA-GA.

    \b
    Example:
      adapterkit rebase ./pissa-trained --initial ./pissa-init --out plain
    """
    from adapterkit.verbs.rebase import rebase as verb

    run_verb(verb, adapter, **options)

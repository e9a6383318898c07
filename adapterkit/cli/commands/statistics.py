"""Commands on statistics of layers: stats."""

from typing import Any

import click

from adapterkit.cli.command import WritingCommand
from adapterkit.cli.completion import Source
from adapterkit.cli.options import (
    choice_option,
    device_option,
    disk_limit_option,
    json_option,
    memory_option,
    plan_option,
    resume_options,
    targets_option,
)
from adapterkit.cli.output import run_verb


@click.command(cls=WritingCommand)
@click.argument("base", type=Source())
@click.option(
    "--data",
    required=True,
    multiple=True,
    type=click.Path(),
    metavar="FILE",
    help="Samples: .txt, .jsonl, .parquet, or a folder of datasets; repeat for several.",
)
@click.option(
    "--out",
    required=True,
    type=click.Path(),
    metavar="FILE.safetensors|hf://ORG/NAME:FILE.safetensors",
    help="Output file (published atomically), or a file of the Hub (one commit).",
)
@click.option(
    "--what",
    multiple=True,
    default=("covariance",),
    show_default=True,
    metavar="KINDS",
    help="Comma-separated: covariance, mean, pca, gradient.",
)
@click.option(
    "--samples", type=int, default=256, show_default=True, help="Number of samples to draw."
)
@click.option(
    "--length",
    type=int,
    help="Cut samples to this many tokens (default: 512, or the model's positions).",
)
@targets_option("all-linear", "Modules to measure")
@click.option("--batch", type=int, default=8, show_default=True, help="Samples per batch.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the draw.")
@click.option(
    "--whole", is_flag=True, help="Hold the whole model in memory instead of one layer at a time."
)
@click.option(
    "--components",
    type=int,
    default=256,
    show_default=True,
    help="Principal components of each module with pca.",
)
@choice_option("--compat", help="PEFT's covariance of CorDA: inputs divided by their largest.")
@click.option("--dry-run", is_flag=True, help="Print the samples, modules and sizes, and stop.")
@plan_option
@json_option
@device_option
@memory_option("activations, which go to disk beyond it")
@disk_limit_option
@choice_option(
    "--engine",
    default="local",
    show_default=True,
    help="What runs it: this machine (for several use --plan).",
)
@resume_options("older statistics")
def stats(base: str, **options: Any) -> None:
    """Collect what a model's layers see of some texts.

    The input covariances, means, principal components and gradients that loftq --stats,
    data-driven inits and the like read. The model runs one layer at a time.

    \b
    Example:
      adapterkit stats ./model --data texts.jsonl --out stats.safetensors
      adapterkit stats ./model --data chats.jsonl --what pca,gradient --out stats.safetensors
      adapterkit stats org/model --data texts.jsonl --out hf://me/statistics:model.safetensors
    """
    from adapterkit.verbs.stats import stats as verb

    run_verb(verb, base, unit=" layers", **options)

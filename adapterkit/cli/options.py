"""Options that several commands share, and how values are read."""

import json
from collections.abc import Callable
from typing import Any

import click

from adapterkit.cli.completion import Source, Targets
from adapterkit.options import CHOICES


def option_group(*options: Callable) -> Callable:
    """Several options as one decorator, in the order of the help."""

    def decorate(command: Callable) -> Callable:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def choice_option(flag: str, choices: str = "", **settings: Any) -> Callable:
    """An option with the values `CHOICES[choices]`, by default those of its own name."""
    values = CHOICES[choices or flag.removeprefix("--").replace("-", "_")]
    return click.option(flag, type=click.Choice(values), **settings)


def base_option(text: str) -> Callable:
    return click.option("--base", type=Source(), metavar="BASE", help=text)


def statistics_option(text: str) -> Callable:
    return click.option("--stats", type=Source(), metavar="FILE", help=text)


def dtype_option(text: str) -> Callable:
    return choice_option("--dtype", help=text)


def refit_options(default: str = "") -> Callable:
    """The rank of the result; `default` is what the help says of results without these options."""
    return option_group(
        click.option("--rank", type=int, help=f"Refit each module to this rank{default}."),
        click.option(
            "--energy",
            type=float,
            help="Refit each module to the smallest rank that keeps this share of its energy.",
        ),
    )


EXACT_BY_DEFAULT = " (default: exact; ranks add up)"


def targets_option(default: str, modules: str = "Modules that get factors") -> Callable:
    return click.option(
        "--targets",
        type=Targets(),
        metavar="NAMES|REGEX",
        help=f"{modules}: all-linear, comma-separated name suffixes "
        f"(q_proj,v_proj), or a regex (default: {default}).",
    )


json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON document to stdout."
)
quiet_option = click.option("--quiet", is_flag=True, help="Show no progress and no summary.")
device_option = click.option(
    "--device",
    default="auto",
    show_default=True,
    metavar="auto|cpu|cuda[:i]",
    help="Where to compute.",
)


def memory_option(use: str) -> Callable:
    return click.option(
        "--memory",
        metavar="SIZE",
        help=f"Memory for {use}, e.g. 8GB (default: a quarter of RAM).",
    )


def resume_options(older: str) -> Callable:
    return option_group(
        click.option("--resume", is_flag=True, help="Continue an interrupted run of the same job."),
        click.option("--overwrite", is_flag=True, help=f"Replace {older}."),
        quiet_option,
    )


disk_limit_option = click.option(
    "--disk-limit",
    metavar="SIZE",
    help="Disk that a job to the Hub may use on this machine, e.g. 20GB.",
)
plan_option = click.option(
    "--plan",
    type=click.Path(),
    metavar="FILE",
    help="Write this plan file, for adapterkit run on several machines, and stop.",
)
running_options = option_group(
    click.option(
        "--dry-run", is_flag=True, help="Print the plan (tensors, bytes, memory, disk) and stop."
    ),
    plan_option,
    json_option,
    device_option,
    memory_option("weights computed at the same time"),
    choice_option(
        "--engine",
        default="local",
        show_default=True,
        help="Where to run: this machine, or a Ray cluster on a shared file system.",
    ),
    click.option(
        "--ray-address",
        metavar="ADDRESS",
        help="Address of the Ray cluster (default: as Ray finds or starts one).",
    ),
    disk_limit_option,
    resume_options("an earlier output of adapterkit in its place"),
)
output_options = option_group(
    click.option(
        "--out",
        required=True,
        type=click.Path(),
        metavar="DIR|hf://ORG/NAME",
        help="Output folder (published atomically), or a repository of the Hub (one commit).",
    ),
    running_options,
)
hash_option = choice_option(
    "--hash", default="sha256", show_default=True, help="Hash of each output file in the receipt."
)
shard_size_option = click.option(
    "--max-shard-size",
    metavar="SIZE",
    help="Re-shard the output, e.g. 5GB (default: keep the base's files).",
)
init_options = option_group(
    click.option("--rank", type=int, required=True, help="Rank of the LoRA factors."),
    click.option("--alpha", type=float, help="lora_alpha (default: the rank, for a scale of 1)."),
    click.option("--rslora", is_flag=True, help="Use the scale alpha / sqrt(rank)."),
)
block_options = option_group(
    click.option(
        "--block-size", type=int, help="Values that share a scale (nf4, fp4: 64; w4a16: 128)."
    ),
    click.option("--double-quant", is_flag=True, help="Quantize the scales too (nf4, fp4)."),
)
factor_options = option_group(
    click.option(
        "--dtype",
        "--factor-dtype",
        "dtype",
        type=click.Choice(CHOICES["dtype"]),
        default="fp32",
        show_default=True,
        help="Dtype of the LoRA factors.",
    ),
    hash_option,
)
rank_options = option_group(
    click.option("--rank", type=int, help="Rank of each module."),
    click.option(
        "--energy", type=float, help="Smallest rank of each module that keeps this energy share."
    ),
    click.option(
        "--sv-ratio",
        type=float,
        help="Keep singular values of at least the largest one divided by this.",
    ),
    click.option(
        "--max-size",
        metavar="SIZE",
        help="Largest file, e.g. 50MB: ranks go to the largest singular values.",
    ),
)
stats_option = click.option(
    "--stats",
    type=Source(),
    metavar="FILE",
    help="Input covariances: minimize output error instead of weight error.",
)
module_filters = option_group(
    click.option("--include", metavar="REGEX", help="Only modules whose name matches this regex."),
    click.option("--exclude", metavar="REGEX", help="No modules whose name matches this regex."),
)
skip_option = click.option(
    "--skip", metavar="REGEX", help="Do not quantize modules whose name matches this regex."
)
set_option = click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="An option of the method, see the lists below; repeat for several.",
)
seed_option = click.option(
    "--seed", type=int, default=0, show_default=True, help="Seed of methods that draw."
)
verify_option = click.option(
    "--verify",
    is_flag=True,
    help="Read the output again: check every hash; of a merge, recompute rows of each changed "
    "tensor.",
)
push_option = click.option(
    "--push",
    metavar="ORG/NAME",
    help="Upload the output to this repository of the Hub too, in one commit.",
)
tokenizer_option = choice_option(
    "--tokenizer",
    help="adapter: copy the adapters' tokenizer (the default if they have one); base: copy none.",
)


def parse_settings(words: tuple[str, ...]) -> dict[str, Any]:
    """KEY=VALUE options; a value is a JSON number, true or false, or else a string."""
    settings = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise click.UsageError(f"--set {word}: give KEY=VALUE")
        try:
            settings[key] = json.loads(value)
        except ValueError:
            settings[key] = value
    return settings

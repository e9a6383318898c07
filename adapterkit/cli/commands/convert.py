"""Commands on formats of adapters: convert."""

from typing import Any

import click

from adapterkit.cli.batch import convert_all
from adapterkit.cli.command import ListingCommand
from adapterkit.cli.completion import Source
from adapterkit.cli.methods import adapter_format_names, adapter_formats
from adapterkit.cli.options import (
    base_option,
    choice_option,
    dtype_option,
    hash_option,
    running_options,
)
from adapterkit.cli.output import print_json, run_verb


@click.command(cls=ListingCommand, lists=adapter_formats)
@click.argument("src", type=Source(), required=False)
@click.option("--to", type=adapter_format_names, help="Format to write; see the list below.")
@click.option(
    "--out",
    type=click.Path(),
    metavar="PATH",
    help="Output: a file if it ends in .safetensors or .gguf, else a folder (published "
    "atomically).",
)
@running_options
@base_option("The adapter's model, where its names or shapes are needed to read or write it.")
@click.option("--alpha", type=float, help="Alpha of a source that has none.")
@click.option(
    "--rank", type=int, help="Make plain factors of this rank of LoHa, LoKr, OFT and the like."
)
@dtype_option("Dtype of the tensors (default: the source's).")
@click.option(
    "--lossy",
    is_flag=True,
    help="Drop norms and biases that the format cannot store.",
)
@choice_option(
    "--prefix-only",
    help="Convert this part of a pipeline alone; of a single model's adapter, which part it is.",
)
@click.option(
    "--architecture",
    metavar="NAME",
    help="The model's family, where the names fit several (see --list).",
)
@click.option(
    "--allow-pickle",
    is_flag=True,
    help="Read .pt, .pth and .bin files with torch's weights_only loader.",
)
@hash_option
@click.option("--detect", is_flag=True, help="Print the format of SRC and what it holds, and stop.")
@click.option("--list", "listing", is_flag=True, help="Print what each format can hold, and stop.")
@click.option(
    "--from-list",
    type=click.Path(allow_dash=True),
    metavar="FILE",
    help="Convert each source of this file, one a line (-: standard input).",
)
@click.option(
    "--out-pattern",
    metavar="PATTERN",
    help="Outputs of --from-list: {name} is the source's name, {parent} its folder's.",
)
@click.pass_context
def convert(
    ctx: click.Context,
    src: str | None,
    detect: bool,
    listing: bool,
    from_list: str | None,
    out_pattern: str | None,
    **options: Any,
) -> None:
    """Convert an adapter between the formats of tools.

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
    _check_usage(src, detect, listing, from_list, out_pattern, options)
    as_json = options["as_json"]
    if listing:
        from adapterkit.reports.formats import formats_table
        from adapterkit.verbs.formats import list_formats

        document = list_formats()
        _print(document, formats_table(document), as_json)
    elif detect:
        from adapterkit.reports.formats import detection_table
        from adapterkit.verbs.formats import detect_format

        assert src is not None
        document = detect_format(src, allow_pickle=options["allow_pickle"])
        _print(document, detection_table(document), as_json)
    elif from_list is not None:
        ctx.exit(convert_all(from_list, out_pattern or "", **options))
    else:
        from adapterkit.verbs.convert import convert as verb

        run_verb(verb, src, **options)


def _check_usage(
    src: str | None,
    detect: bool,
    listing: bool,
    from_list: str | None,
    out_pattern: str | None,
    options: dict[str, Any],
) -> None:
    """A usage error unless there is one thing to do, with what it needs."""
    if (src is not None) + listing + (from_list is not None) != 1:
        raise click.UsageError("give SRC, --list or --from-list FILE")
    if listing or detect:
        taken = {"--to": options["to"], "--out": options["out"], "--out-pattern": out_pattern}
        more = [name for name, value in taken.items() if value is not None]
        if more or (detect and src is None):
            raise click.UsageError("--detect takes only SRC, --list takes nothing")
        return
    if options["plan"] is not None and src is None:
        raise click.UsageError("--plan takes one SRC, not --from-list")
    if options["to"] is None:
        raise click.UsageError("Missing option '--to'.")
    needed, other = ("--out-pattern", "--out") if src is None else ("--out", "--out-pattern")
    values = {"--out": options["out"], "--out-pattern": out_pattern}
    if values[needed] is None or values[other] is not None:
        raise click.UsageError(f"with {'--from-list' if src is None else 'SRC'} give {needed}")


def _print(document: dict[str, Any], table: str, as_json: bool) -> None:
    if as_json:
        print_json(document)
    else:
        click.echo(table)
